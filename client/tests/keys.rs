//! Keys: who may read them, their words, and the commands that move them.
#![allow(clippy::unwrap_used)]

#[path = "support/home.rs"]
mod support;

use std::io::Write;
use std::process::Stdio;

use kinoflock_client::keys::{self, KeyError};
use support::{Home, text};

#[test]
fn a_key_is_written_once_for_its_owner_alone() {
    let home = Home::new();
    let path = home.path().join("keys").join("artist.key");
    assert!(matches!(keys::load(&path), Err(KeyError::Missing { .. })));
    let (key, made) = keys::load_or_create(&path).unwrap();
    assert!(made);
    let (again, made) = keys::load_or_create(&path).unwrap();
    assert!(!made);
    assert_eq!(key.public(), again.public());
    assert!(matches!(keys::save(&path, &keys::new_seed().unwrap()), Err(KeyError::Exists { .. })));
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left there");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[cfg(unix)]
#[test]
fn a_key_that_others_may_read_is_refused_with_what_to_do() {
    use std::os::unix::fs::PermissionsExt;
    let home = Home::new();
    let path = home.path().join("artist.key");
    keys::load_or_create(&path).unwrap();
    for mode in [0o640, 0o604, 0o660, 0o666, 0o620] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let error = keys::load(&path).unwrap_err();
        assert!(error.to_string().contains(&format!("mode {mode:03o}")), "{error}");
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
    let output = home.kinoflock(&["key", "show", "--key", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
}

#[test]
fn a_damaged_key_is_named() {
    let home = Home::new();
    let path = home.path().join("artist.key");
    keys::load_or_create(&path).unwrap();
    std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"\n").unwrap();
    let error = keys::load(&path).unwrap_err().to_string();
    assert!(error.contains("has 33 bytes, a key has 32"), "{error}");
}

#[test]
fn words_bring_a_key_back_and_a_wrong_word_is_named() {
    let home = Home::new();
    let made = home.kinoflock(&["key", "new"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let shown = text(&home.kinoflock(&["key", "show"]).stdout);
    assert!(shown.starts_with("kf1"), "{shown}");
    let words = text(&home.kinoflock(&["key", "backup"]).stdout);
    assert_eq!(words.split_whitespace().filter(|word| !word.ends_with('.')).count(), 24, "{words}");

    let other = Home::new();
    let mut restore = other.command(&["key", "restore"]);
    let mut child =
        restore.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(words.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&other.kinoflock(&["key", "show"]).stdout), shown);

    let mut list: Vec<&str> = words.split_whitespace().filter(|word| !word.ends_with('.')).collect();
    let first = list[0];
    list[0] = "kinoflock";
    let third = Home::new();
    let output = third.kinoflock(&[&["key", "restore"], &list[..]].concat());
    assert_eq!(output.status.code(), Some(3));
    assert!(
        text(&output.stderr).contains("word 1 (\"kinoflock\") is not in the list"),
        "{}",
        text(&output.stderr)
    );
    list[0] = if first == "zoo" { "zone" } else { "zoo" };
    let output = third.kinoflock(&[&["key", "restore"], &list[..]].concat());
    assert!(text(&output.stderr).contains("checksum"), "{}", text(&output.stderr));
    let output = third.kinoflock(&[&["key", "restore"], &list[..23]].concat());
    assert!(text(&output.stderr).contains("there are 23 of them, a key has 24"), "{}", text(&output.stderr));
    assert_eq!(third.kinoflock(&["key", "show"]).status.code(), Some(3), "nothing was made");
}

#[test]
fn an_exported_key_is_imported_elsewhere() {
    let (home, other) = (Home::new(), Home::new());
    home.kinoflock(&["key", "new"]);
    let shown = home.kinoflock(&["key", "show", "--json"]);
    let file = home.path().join("copy.key");
    let output = home.kinoflock(&["key", "export", "-o", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = other.kinoflock(&["key", "import", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&other.kinoflock(&["key", "show", "--json"]).stdout), text(&shown.stdout));
    let again = other.kinoflock(&["key", "import", file.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(3), "a key is never overwritten");
}
