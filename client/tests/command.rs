//! The real command: help, exit codes, errors that say what to do. Nothing here needs a network.
#![allow(clippy::unwrap_used)]

#[path = "support/home.rs"]
mod support;

use support::{Home, text};

#[test]
fn help_is_there_for_every_command_with_examples() {
    let home = Home::new();
    let output = home.kinoflock(&["--help"]);
    assert!(output.status.success());
    let help = text(&output.stdout);
    for command in
        ["generate", "ps", "status", "wait", "cancel", "ls", "get", "share", "rm", "show", "verify", "audit"]
    {
        assert!(help.contains(command), "{command}");
        assert!(home.kinoflock(&[command, "--help"]).status.success(), "{command}");
    }
    for command in ["nodes", "models", "join", "key", "completions"] {
        assert!(help.contains(command), "{command}");
    }
    let help = text(&home.kinoflock(&["run", "--help"]).stdout);
    assert!(help.contains("Examples:") && help.contains("reads your prompt"), "{help}");
    assert!(text(&home.kinoflock(&["completions", "bash"]).stdout).contains("_kinoflock"));
}

#[test]
fn wrong_use_exits_with_2_and_the_nearest_flag() {
    let home = Home::new();
    for arguments in
        [&["generate"][..], &["generate", "x", "--frames", "0"], &["frobnicate"], &["status", "abc"]]
    {
        assert_eq!(home.kinoflock(arguments).status.code(), Some(2), "{arguments:?}");
    }
    let output = home.kinoflock(&["generate", "x", "--frame", "17"]);
    assert!(text(&output.stderr).contains("--frames"), "{}", text(&output.stderr));
    let output = home.kinoflock(&["generate", "x", "--frames", "0"]);
    assert!(
        text(&output.stderr).contains("frames: 0 is below the least possible, 1"),
        "{}",
        text(&output.stderr)
    );
    assert!(!home.path().join("keys").exists(), "nothing was begun");
}

#[test]
fn what_is_not_there_yet_says_so_before_anything_is_sent() {
    let home = Home::new();
    let output = home.kinoflock(&["generate", "x", "--collective", "x"]);
    assert_eq!(output.status.code(), Some(2));
    let words = text(&output.stderr);
    assert!(words.contains("--collective") && words.contains("not there yet"), "{words}");
}

#[test]
fn a_file_that_is_no_image_and_a_clip_that_is_not_here_are_named_before_anything_is_sent() {
    let home = Home::new();
    let file = home.path().join("a.png");
    std::fs::write(&file, b"GIF89a").unwrap();
    let file = file.to_str().unwrap();
    for (flag, value, said) in [
        ("--image", file, "neither PNG nor JPEG"),
        ("--end-image", "nowhere.png", "nowhere.png"),
        ("--keyframe", "4", "FRAME=FILE"),
        ("--extend", "clip1zzzz", "clip1zzzz"),
    ] {
        let output = home.kinoflock(&["generate", "x", flag, value]);
        assert!(!output.status.success());
        assert!(text(&output.stderr).contains(said), "{}", text(&output.stderr));
    }
}

#[test]
fn no_node_says_what_to_do_and_exits_with_4() {
    let home = Home::new();
    let output = home.kinoflock(&["generate", "x"]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    let words = text(&output.stderr);
    assert!(words.contains("kinoflock join TICKET") && words.contains("kinoflockd try"), "{words}");
    assert!(words.contains("kinoflock key backup"), "a new key is told of: {words}");
    assert!(output.stdout.is_empty(), "words are not data");
    let output = home.kinoflock(&["generate", "x", "--node", "127.0.0.1:1", "--json"]);
    assert_eq!(output.status.code(), Some(4));
    let records: Vec<serde_json::Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(records.iter().all(|record| record["schema"] == 1));
    assert_eq!(records.last().unwrap()["code"], "no_node");
    assert!(text(&output.stdout).starts_with("{\"schema\":1"), "{}", text(&output.stdout));
}

#[test]
fn a_prompt_beyond_the_protocol_is_refused_with_both_lengths() {
    let home = Home::new();
    std::fs::write(home.path().join("prompt.txt"), "x".repeat(9000)).unwrap();
    let output = home.kinoflock(&["generate", "--prompt-file", "prompt.txt"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("exceeds the limit of 8192 bytes"), "{}", text(&output.stderr));
}

#[test]
fn configuration_and_store_faults_exit_with_3() {
    let home = Home::new();
    std::fs::write(home.path().join("config.toml"), "modle = \"motif\"\n").unwrap();
    let output = home.kinoflock(&["ls"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("did you mean \"model\"?"), "{}", text(&output.stderr));
    std::fs::remove_file(home.path().join("config.toml")).unwrap();
    assert!(home.kinoflock(&["ls"]).status.success());
    std::fs::write(home.path().join("client").join("VERSION"), "9").unwrap();
    let output = home.kinoflock(&["ls"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        text(&output.stderr).contains("version 9, this release reads up to 1"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_damaged_ticket_is_named_and_not_kept() {
    let home = Home::new();
    let output = home.kinoflock(&["join", "kfnode1abcdefgh"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("damaged"), "{}", text(&output.stderr));
    let output = home.kinoflock(&["join", "kfclip1abcdefgh"]);
    assert!(text(&output.stderr).contains("kinoflock get"), "{}", text(&output.stderr));
    let output = home.kinoflock(&["join", "127.0.0.1:1"]);
    assert!(output.status.success(), "an address that does not answer now is kept: {}", text(&output.stderr));
}
