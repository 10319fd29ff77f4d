//! The programs under test, built as the ordinary command of this profile builds them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The folder of the programs, freshly built.
///
/// # Panics
/// When they cannot be built.
pub fn programs() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace");
        // The very selection of the ordinary command: another one would build dependencies with other features.
        let selection: &[&str] = if cfg!(debug_assertions) {
            &["test", "--workspace", "--no-run", "--quiet"]
        } else {
            &["build", "--release", "--workspace", "--quiet"]
        };
        let mut build = Command::new(cargo);
        build.args(selection).current_dir(root);
        // What cargo told this test of itself would make build scripts of dependencies run anew.
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_of_package(name)) {
            build.env_remove(name);
        }
        let built = build.output().expect("cargo runs");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let own = std::env::current_exe().expect("this program has a path");
        own.parent().and_then(Path::parent).expect("a test lies in target/<profile>/deps").to_owned()
    })
}

/// Whether a variable is one that cargo sets for the package that it runs.
fn is_of_package(name: &OsStr) -> bool {
    let of = [
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_BIN_",
        "CARGO_CRATE_",
        "CARGO_PRIMARY_",
        "CARGO_TARGET_TMPDIR",
    ];
    name.to_str().is_some_and(|name| of.iter().any(|prefix| name.starts_with(prefix)))
}
