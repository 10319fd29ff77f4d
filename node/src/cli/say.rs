//! The only place of the daemon that prints: data to stdout, words to stderr.
#![expect(clippy::print_stderr, reason = "this is the command line's output module")]

use std::io::{ErrorKind, Write};

/// What was asked for.
pub(super) fn data(text: &str) {
    bytes(format!("{}\n", text.trim_end_matches('\n')).as_bytes());
}

/// What was asked for, as it is. A reader that has seen enough, such as `head`, is no fault.
pub(super) fn bytes(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => eprintln!("error: cannot write: {error}"),
        Ok(()) | Err(_) => {}
    }
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
