//! What a file proves by itself, and that no byte of it can change unseen.
#![allow(clippy::unwrap_used)]

#[path = "support/home.rs"]
mod support;

use std::process::Command;

use kinoflock_client::provenance::{self, ProvenanceError, Statement};
use kinoflock_client::store::Store;
use kinoflock_client::verify::{self, VerifyError};
use kinoflock_protocol::receipt::Verdict;
use kinoflock_protocol::{ClipId, Envelope, ValidJob};
use support::{CLIP, Home, PROMPT, answer, done_record, job, network, node, signed_receipt, text};

fn exported(with_prompt: bool) -> Vec<u8> {
    let job = job(1);
    let receipt = signed_receipt(&job);
    let answer = answer(&receipt);
    let statement = Statement {
        network: network(),
        receipt: &receipt,
        answer: Some(&answer),
        job: &job,
        model_name: "motif",
        with_prompt,
        cards: &[],
    };
    provenance::export(CLIP, &statement).unwrap()
}

#[test]
fn an_exported_file_says_who_made_it_and_holds_the_bare_clip() {
    let file = exported(false);
    assert_eq!(provenance::bare(&file), CLIP);
    let verified = provenance::check(&file).unwrap();
    assert_eq!(verified.clip, ClipId::of(CLIP));
    assert_eq!(verified.receipt.receipt().node, node().node_id());
    assert_eq!(verified.network, network());
    assert_eq!(verified.verdict, Some(Verdict::Accept));
    assert_eq!(verified.facts.artist.as_deref(), Some("Ada & Co"));
    assert_eq!((verified.info.frames, verified.info.width, verified.info.height), (17, 64, 64));
    assert!(verified.job.is_none() && verified.facts.prompt.is_none());
    let words = PROMPT.split(' ').find(|word| word.len() > 4).unwrap();
    assert!(!file.windows(words.len()).any(|w| w == words.as_bytes()), "the prompt stays out");
}

#[test]
fn the_prompt_goes_in_only_when_asked_and_is_then_proven() {
    let verified = provenance::check(&exported(true)).unwrap();
    assert_eq!(verified.facts.prompt.as_deref(), Some(PROMPT));
    assert_eq!(verified.job.unwrap().prompt.as_str(), PROMPT);
}

#[test]
fn every_flipped_byte_is_an_error() {
    let file = exported(true);
    for at in 0..file.len() {
        let mut changed = file.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(provenance::check(&changed).is_err(), "byte {at} of {} may change unseen", file.len());
    }
    for cut in [1, 7, 100, file.len() - CLIP.len()] {
        assert!(provenance::check(&file[..file.len() - cut]).is_err(), "{cut} bytes cut off");
    }
    let mut longer = file.clone();
    longer.extend_from_slice(&[0, 0, 0, 8, b'f', b'r', b'e', b'e']);
    assert_eq!(provenance::check(&longer).unwrap_err(), ProvenanceError::Behind { given: 8 });
}

#[test]
fn a_receipt_for_another_clip_does_not_pass() {
    let mut other = CLIP.to_vec();
    let last = other.len() - 1;
    other[last] ^= 1;
    let job = job(1);
    let receipt = signed_receipt(&job);
    let statement = Statement {
        network: network(),
        receipt: &receipt,
        answer: None,
        job: &job,
        model_name: "motif",
        with_prompt: false,
        cards: &[],
    };
    assert!(matches!(provenance::export(&other, &statement), Err(ProvenanceError::WrongBytes { .. })));
    let mut swapped = other;
    swapped.extend_from_slice(&exported(false)[CLIP.len()..]);
    let error = provenance::check(&swapped).unwrap_err();
    assert!(error.to_string().contains("the video's bytes were changed"), "{error}");
}

#[test]
fn the_command_names_a_changed_byte_and_exits_with_7() {
    let home = Home::new();
    let path = home.path().join("clip.mp4");
    let file = exported(false);
    std::fs::write(&path, &file).unwrap();
    let verify = || home.kinoflock(&["verify", "clip.mp4"]);
    let output = verify();
    assert!(output.status.success(), "{}", text(&output.stderr));
    for what in [node().node_id().to_string(), "motif".to_owned(), ClipId::of(CLIP).to_string()] {
        assert!(text(&output.stdout).contains(&what), "{what} in {}", text(&output.stdout));
    }
    // One in every part of the file: head, tables, pictures, the box's head, the packet, its end.
    let box_at = CLIP.len();
    for at in [0, 5, 40, 700, CLIP.len() - 9, box_at, box_at + 5, box_at + 12, box_at + 600, file.len() - 4] {
        let mut changed = file.clone();
        changed[at] ^= 0x04;
        std::fs::write(&path, &changed).unwrap();
        let output = verify();
        assert_eq!(output.status.code(), Some(7), "byte {at}: {}", text(&output.stdout));
        let words = text(&output.stderr);
        assert!(words.contains("changed") || words.contains("no Kinoflock receipt"), "byte {at}: {words}");
    }
    let output = home.kinoflock(&["verify", "--json", "clip.mp4"]);
    let record: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((record["schema"].as_u64(), record["exit"].as_u64()), (Some(1), Some(7)));
}

#[test]
fn clips_of_ones_own_are_listed_shown_and_saved_without_any_network() {
    let home = Home::new();
    let store = Store::open(home.path().join("client")).unwrap();
    let record = done_record();
    store.insert_job(&record).unwrap();
    store.insert_blob(CLIP).unwrap();
    let clip = ClipId::of(CLIP);
    let listed = text(&home.kinoflock(&["ls"]).stdout);
    assert!(listed.contains(&clip.short()) && listed.contains("here"), "{listed}");
    assert!(text(&home.kinoflock(&["ps", "--all"]).stdout).contains("done"));
    assert!(text(&home.kinoflock(&["show", &clip.short()]).stdout).contains(PROMPT));
    assert!(text(&home.kinoflock(&["share", &clip.short()]).stdout).starts_with("kfclip1"));
    let output = home.kinoflock(&["get", &record.job.short(), "-o", "out.mp4"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).trim(), "out.mp4");
    let file = std::fs::read(home.path().join("out.mp4")).unwrap();
    assert_eq!(provenance::check(&file).unwrap().clip, clip);
    home.kinoflock(&["get", &clip.short(), "--bare", "-o", "bare.mp4"]);
    assert_eq!(std::fs::read(home.path().join("bare.mp4")).unwrap(), CLIP);
    assert!(home.kinoflock(&["verify", "bare.mp4"]).status.success(), "known from the store");
    let piped = home.kinoflock(&["get", &clip.short(), "--with-prompt", "-o", "-"]);
    assert_eq!(provenance::check(&piped.stdout).unwrap().facts.prompt.as_deref(), Some(PROMPT));
    assert!(home.kinoflock(&["rm", &clip.short()]).status.success());
    assert!(text(&home.kinoflock(&["ls"]).stdout).is_empty());
}

#[test]
fn an_exported_file_still_plays() {
    let home = Home::new();
    let path = home.path().join("clip.mp4");
    std::fs::write(&path, exported(true)).unwrap();
    let arguments =
        ["-v", "error", "-count_frames", "-show_entries", "stream=nb_read_frames", "-of", "csv=p=0"];
    // Where there is no player, the check of the structure must do.
    let Ok(output) = Command::new("ffprobe").args(arguments).arg(&path).output() else { return };
    assert_eq!(text(&output.stdout).trim(), "17", "{}", text(&output.stderr));
    let output = Command::new("ffprobe")
        .args(["-v", "error", "-export_xmp", "1", "-show_entries", "format_tags", "-of", "json"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(text(&output.stdout).contains("trainedAlgorithmicMedia"), "{}", text(&output.stdout));
}

fn valid(job: &Envelope) -> ValidJob {
    ValidJob::parse_stored(job, &network()).unwrap()
}

#[test]
fn a_clip_that_is_not_what_was_asked_for_is_told_apart() {
    let job = job(1);
    let clip = ClipId::of(CLIP);
    let info = verify::clip(CLIP, &clip, &valid(&job)).unwrap();
    assert_eq!(info.fps, Some(kinoflock_protocol::Micro::whole(8)));
    let mut spec = valid(&job).into_spec();
    spec.frames = 25;
    let other = Envelope::seal(&support::artist(), &network(), &spec).unwrap();
    let error = verify::clip(CLIP, &clip, &valid(&other)).unwrap_err();
    assert_eq!(error.to_string(), "the clip has frames 17, the job asked for 25");
    assert!(matches!(verify::clip(&CLIP[1..], &clip, &valid(&job)), Err(VerifyError::WrongBytes { .. })));
    let error = verify::receipt(&signed_receipt(&job), &network(), &valid(&other), &node().node_id());
    assert!(matches!(error, Err(VerifyError::Mismatch { what: "job", .. })));
}

#[test]
fn damaged_clips_are_errors_and_never_more() {
    for at in 0..CLIP.len() {
        for bits in [0x01, 0x80, 0xff] {
            let mut changed = CLIP.to_vec();
            changed[at] ^= bits;
            // Some changes leave a clip that is as well formed as before.
            let _ = verify::clip_info(&changed);
        }
        assert!(verify::clip_info(&CLIP[..at]).is_err(), "cut after {at} bytes");
    }
    // A table that claims four thousand million samples in no bytes.
    let at = CLIP.windows(4).position(|name| name == b"stsz").unwrap();
    let mut bomb = CLIP.to_vec();
    bomb[at + 8..at + 12].copy_from_slice(&1u32.to_be_bytes());
    bomb[at + 12..at + 16].copy_from_slice(&u32::MAX.to_be_bytes());
    let error = verify::clip_info(&bomb).unwrap_err().to_string();
    assert!(error.contains("claims 4294967295 entries"), "{error}");
}
