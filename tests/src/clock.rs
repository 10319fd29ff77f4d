//! A wrong clock for real processes: a shim over the C library's clock, built once a folder with the system's compiler,
//! which the codec needs anyhow. The programs themselves know nothing of it.

use std::path::{Path, PathBuf};
use std::process::Command;

const SHIM: &str = r#"
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    int result = (int)syscall(SYS_clock_gettime, id, now);
    const char *ahead = getenv("CLOCK_AHEAD_SECONDS");
    if (result == 0 && id == CLOCK_REALTIME && ahead) now->tv_sec += atol(ahead);
    return result;
}
"#;

/// Environment variables that set a process's clock so many seconds ahead; the shim is built in `folder`.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn ahead(folder: &Path, seconds: i64) -> [(&'static str, String); 2] {
    let library = shim(folder);
    [("LD_PRELOAD", library.display().to_string()), ("CLOCK_AHEAD_SECONDS", seconds.to_string())]
}

fn shim(folder: &Path) -> PathBuf {
    let (source, library) = (folder.join("clock.c"), folder.join("clock.so"));
    std::fs::write(&source, SHIM).expect("a file");
    let mut compiler = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    let built = compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output();
    let built = built.expect("a C compiler");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    library
}
