//! This engine against the reference: every golden tensor of every folder in `tests/goldens`, and that the comparison
//! itself fails where it must.
#![allow(clippy::unwrap_used)]

#[path = "../examples/parity/harness.rs"]
mod harness;
#[path = "support/tiny.rs"]
mod tiny;

use std::path::{Path, PathBuf};

fn goldens(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn assert_parity(name: &str, rows: usize) {
    let report = harness::check_folder(&goldens(name));
    assert_eq!(report.bad(), 0, "{report}");
    assert!(report.len() >= rows, "only {} rows\n{report}", report.len());
}

#[test]
fn ltx_video_0_9_0_is_within_tolerance() {
    assert_parity("ltx-video-0.9.0", 60);
}

#[test]
fn ltx_video_0_9_1_is_within_tolerance() {
    assert_parity("ltx-video-0.9.1", 3);
}

#[test]
fn ltx_video_0_9_5_is_within_tolerance() {
    assert_parity("ltx-video-0.9.5", 80);
}

#[test]
fn ltx_video_with_pictures_is_within_tolerance() {
    assert_parity("ltx-video-pictures", 44);
}

#[test]
fn ltx_videos_second_pass_is_within_tolerance() {
    assert_parity("ltx-video-second-pass", 8);
}

#[test]
fn cogvideox_2b_is_within_tolerance() {
    assert_parity("cogvideox-2b", 100);
}

#[test]
fn cogvideox_5b_is_within_tolerance() {
    assert_parity("cogvideox-5b", 110);
}

#[test]
fn cogvideox_1_5_is_within_tolerance() {
    assert_parity("cogvideox-1.5", 110);
}

#[test]
fn mochi_1_is_within_tolerance() {
    assert_parity("mochi-1", 60);
}

#[test]
fn mochi_1_by_candles_own_operations_is_within_tolerance() {
    kinoflock_inference::nn::set_generic_only(true);
    let report = harness::check_folder(&goldens("mochi-1"));
    kinoflock_inference::nn::set_generic_only(false);
    assert_eq!(report.bad(), 0, "{report}");
}

#[test]
fn wan_2_1_is_within_tolerance() {
    assert_parity("wan2.1", 90);
}

#[test]
fn wan_2_2_is_within_tolerance() {
    assert_parity("wan2.2-a14b", 15);
    assert_parity("wan2.2-ti2v-5b", 12);
}

#[test]
fn wan_image_to_video_is_within_tolerance() {
    assert_parity("wan2.1-i2v", 7);
    assert_parity("wan2.1-flf2v", 7);
    assert_parity("wan2.2-i2v-a14b", 14);
    assert_parity("wan2.2-ti2v-pictures", 7);
}

#[test]
fn pyramid_flow_miniflux_is_within_tolerance() {
    assert_parity("pyramid-flow-miniflux", 80);
}

#[test]
fn pyramid_flow_sd3_is_within_tolerance() {
    assert_parity("pyramid-flow-sd3", 31);
}

#[test]
fn pyramid_flow_image_to_video_is_within_tolerance() {
    assert_parity("pyramid-flow-miniflux-i2v", 2);
}

#[test]
fn cogvideox_image_to_video_is_within_tolerance() {
    assert_parity("cogvideox-5b-i2v", 14);
    assert_parity("cogvideox-1.5-i2v", 14);
}

/// A copy of the 0.9.0 folder whose manifest was changed.
fn changed(change: impl FnOnce(&mut serde_json::Value)) -> tempfile::TempDir {
    let folder = tiny::copied(&goldens("ltx-video-0.9.0"));
    tiny::edit(&folder.path().join("manifest.json"), change);
    folder
}

fn only(manifest: &mut serde_json::Value, name: &str) {
    manifest["goldens"].as_object_mut().unwrap().retain(|key, _| key == name);
}

#[test]
fn a_golden_of_an_unknown_kind_is_a_failing_row() {
    let folder = changed(|manifest| {
        only(manifest, "rope");
        let golden = manifest["goldens"].as_object_mut().unwrap().remove("rope").unwrap();
        manifest["goldens"]["brand_new"] = golden;
    });
    let report = harness::check_folder(folder.path());
    assert_eq!(report.bad(), report.len());
    assert!(report.to_string().contains("not compared"));
}

#[test]
fn a_difference_above_the_tolerance_fails() {
    let folder = changed(|manifest| {
        only(manifest, "rope");
        manifest["goldens"]["rope"]["tensors"]["out.cos"]["atol"] = serde_json::json!(-1.0);
    });
    assert_eq!(harness::check_folder(folder.path()).bad(), 1);
}

#[test]
fn a_missing_golden_file_a_missing_tensor_and_an_empty_manifest_fail() {
    let folder = changed(|manifest| {
        only(manifest, "rope");
        manifest["goldens"]["rope"]["tensors"]["out.extra"] = serde_json::json!({"atol": 1.0, "shape": [1]});
    });
    assert_eq!(harness::check_folder(folder.path()).bad(), 1);
    std::fs::remove_file(folder.path().join("goldens/rope.safetensors")).unwrap();
    assert_eq!(harness::check_folder(folder.path()).bad(), 1);
    let empty = changed(|manifest| manifest["goldens"] = serde_json::json!({}));
    assert_eq!(harness::check_folder(empty.path()).bad(), 1);
    std::fs::remove_file(empty.path().join("manifest.json")).unwrap();
    assert_eq!(harness::check_folder(empty.path()).bad(), 1);
}
