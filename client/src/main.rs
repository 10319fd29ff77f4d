//! kinoflock: the artist's command.

use std::process::ExitCode;

use clap::Parser;
use kinoflock_client::cli::{self, Cli};

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return cli::no_runtime(&error),
    };
    let code = runtime.block_on(cli::run(Cli::parse()));
    // A question on the terminal that nobody answered must not hold the process.
    runtime.shutdown_background();
    ExitCode::from(code)
}
