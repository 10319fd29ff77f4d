//! `kinoflockd`: see `kinoflockd --help`.

fn main() -> std::process::ExitCode {
    kinoflock_node::cli::main()
}
