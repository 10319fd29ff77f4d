//! Compares this engine with the reference on folders of goldens: `parity DIR...`.
//!
//! A folder holds `pipeline/` (a model in the published layout), `goldens/*.safetensors` and `manifest.json`. Every
//! golden tensor gets a row: largest absolute difference, tolerance, verdict. The exit code is 1 if a tensor differs or
//! was not compared, whatever the reason, and 2 if no folder was named.

#[path = "parity/harness.rs"]
mod harness;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let folders: Vec<String> = std::env::args().skip(1).collect();
    let mut out = std::io::stdout().lock();
    if folders.is_empty() {
        let _ = writeln!(out, "usage: parity DIR... (each with pipeline/, goldens/ and manifest.json)");
        return ExitCode::from(2);
    }
    let mut bad = 0;
    for folder in &folders {
        let report = harness::check_folder(Path::new(folder));
        bad += report.bad();
        let _ = writeln!(out, "{folder}\n{report}");
    }
    let _ = writeln!(
        out,
        "{}",
        if bad == 0 { "all within tolerance".to_owned() } else { format!("{bad} rows fail") }
    );
    ExitCode::from(u8::from(bad > 0))
}
