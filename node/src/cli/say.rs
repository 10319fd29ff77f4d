//! The only place of the daemon that prints: data to stdout, words to stderr.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the command line's output module")]

/// What was asked for.
pub(super) fn data(text: &str) {
    println!("{}", text.trim_end_matches('\n'));
}

/// What a person should know.
pub(super) fn words(text: &str) {
    eprintln!("{text}");
}

/// Why it did not work, with its causes, on one line each.
pub(super) fn error(error: &anyhow::Error) {
    eprintln!("error: {error}");
    let mut said = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // An error that quotes its source says it already.
        if !said.contains(&cause) {
            eprintln!("  because: {cause}");
        }
        said = cause;
    }
}
