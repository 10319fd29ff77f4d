//! Who may read a key file: mode 0600 on Unix, an access list with the owner alone on Windows.

use std::fs::{Metadata, OpenOptions};
use std::path::Path;

use super::KeyError;

/// Opens the file for its owner alone from the first moment, where the system can.
#[cfg(unix)]
pub(super) fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600)
}

/// Takes others' rights away from a file that is still empty.
#[cfg(unix)]
pub(super) fn close(path: &Path) -> Result<(), KeyError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(|error| {
        KeyError::Permissions { action: "set", path: path.to_owned(), reason: error.to_string() }
    })
}

/// Refuses a file that others may read.
#[cfg(unix)]
pub(super) fn refuse_open(path: &Path, data: &Metadata) -> Result<(), KeyError> {
    use std::os::unix::fs::PermissionsExt;
    let mode = data.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    Err(KeyError::Open {
        path: path.to_owned(),
        given: format!("mode {mode:03o}, at most 600 is allowed"),
        remedy: format!("chmod 600 {}", path.display()),
    })
}

#[cfg(not(unix))]
pub(super) fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    options
}

/// Inherited rights go; the user who runs this keeps full control.
#[cfg(windows)]
pub(super) fn close(path: &Path) -> Result<(), KeyError> {
    icacls("set", path, &["/inheritance:r", "/grant:r", &format!("{}:F", user())]).map(drop)
}

/// Well-known groups in an access list of the form that `icacls /save` writes: everyone (WD), the users of this
/// machine (BU), whoever logged in (AU), guests (BG), anonymous (AN), the network (NU).
#[cfg(windows)]
const OTHERS: [&str; 6] = [";;;WD)", ";;;BU)", ";;;AU)", ";;;BG)", ";;;AN)", ";;;NU)"];

/// Refuses a file that well-known groups of others may read.
#[cfg(windows)]
pub(super) fn refuse_open(path: &Path, _: &Metadata) -> Result<(), KeyError> {
    let fault = |reason: String| KeyError::Permissions { action: "read", path: path.to_owned(), reason };
    let list = std::env::temp_dir().join(format!("kinoflock-acl-{}", crate::store::unique()));
    let asked = icacls("read", path, &["/save", &list.to_string_lossy()]);
    let bytes = std::fs::read(&list);
    // What is there now was read; the file itself is of no further use.
    let _ = std::fs::remove_file(&list);
    asked?;
    let wide: Vec<u16> = bytes
        .map_err(|error| fault(error.to_string()))?
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
        .collect();
    let text = String::from_utf16_lossy(&wide);
    match OTHERS.iter().find(|group| text.contains(*group)) {
        None => Ok(()),
        Some(group) => Err(KeyError::Open {
            path: path.to_owned(),
            given: format!("its access list names the group {}", group.trim_matches([';', ')'])),
            remedy: format!("icacls \"{}\" /inheritance:r /grant:r \"{}:F\"", path.display(), user()),
        }),
    }
}

#[cfg(windows)]
fn icacls(action: &'static str, path: &Path, arguments: &[&str]) -> Result<(), KeyError> {
    let fault = |reason: String| KeyError::Permissions { action, path: path.to_owned(), reason };
    let output = std::process::Command::new("icacls")
        .arg(path)
        .args(arguments)
        .output()
        .map_err(|error| fault(format!("icacls cannot be run: {error}")))?;
    if !output.status.success() {
        return Err(fault(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(())
}

#[cfg(windows)]
fn user() -> String {
    let name = std::env::var("USERNAME").unwrap_or_default();
    match std::env::var("USERDOMAIN") {
        Ok(domain) if !domain.is_empty() => format!("{domain}\\{name}"),
        _ => name,
    }
}

#[cfg(not(any(unix, windows)))]
pub(super) fn close(_: &Path) -> Result<(), KeyError> {
    Ok(())
}

#[cfg(not(any(unix, windows)))]
pub(super) fn refuse_open(_: &Path, _: &Metadata) -> Result<(), KeyError> {
    Ok(())
}
