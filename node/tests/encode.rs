//! Frames to a clip and back: colours, sizes, and the same bytes for the same frames.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;

use kinoflock_node::engine::encode::{EncodeError, Quality, encode_mp4};
use kinoflock_node::engine::frames::{
    RgbFrames, clip_info, decode_mp4, decode_mp4_bytes, preview_png, psnr, strip, write_pngs, write_strip,
};

/// A red disc over a blue field with a soft edge, drifting left.
fn disc(width: usize, height: usize, count: usize) -> RgbFrames {
    let mut data = Vec::new();
    for t in 0..count {
        let (cx, cy) = (width as f64 * 0.6 - t as f64 * 1.5, height as f64 * 0.5);
        for y in 0..height {
            for x in 0..width {
                let distance = (x as f64 - cx).hypot(y as f64 - cy) - height as f64 * 0.25;
                let inside = (0.5 - distance).clamp(0.0, 1.0);
                let mix = |a: f64, b: f64| (a * inside + b * (1.0 - inside)).round() as u8;
                data.extend([mix(210.0, 40.0), mix(40.0, 60.0), mix(50.0, 180.0)]);
            }
        }
    }
    RgbFrames { width, height, count, data }
}

#[test]
fn the_same_frames_give_the_same_bytes() {
    let frames = disc(64, 64, 17);
    let first = encode_mp4(&frames, 8.0, Quality::Archive).unwrap();
    assert_eq!(first, encode_mp4(&frames, 8.0, Quality::Archive).unwrap());
    assert!(encode_mp4(&frames, 8.0, Quality::Preview).unwrap().len() < first.len());
}

#[test]
fn a_clip_decodes_to_what_went_in() {
    for (width, height, count, least) in
        [(64, 64, 17, 28.0), (16, 16, 1, 22.0), (128, 96, 9, 30.0), (96, 32, 2, 28.0)]
    {
        let frames = disc(width, height, count);
        let clip = encode_mp4(&frames, 8.0, Quality::Archive).unwrap();
        let info = clip_info(&clip).unwrap();
        assert_eq!((info.width, info.height, info.frames), (width, height, count));
        if count > 1 {
            assert!((info.fps - 8.0).abs() < 1e-9, "{}", info.fps);
        }
        let back = decode_mp4_bytes(&clip).unwrap();
        let quality = psnr(&frames, &back).unwrap();
        // Chroma at half resolution limits the sharp edge of a saturated disc; smaller pictures have more edge.
        assert!(quality > least, "{width}x{height}: {quality:.1} dB");
    }
}

#[test]
fn a_flat_colour_survives_within_a_few_steps() {
    for color in [[210, 40, 50], [40, 60, 180], [255, 255, 255], [0, 0, 0], [20, 200, 90]] {
        let frames = RgbFrames { width: 64, height: 64, count: 3, data: color.repeat(64 * 64 * 3) };
        let back = decode_mp4_bytes(&encode_mp4(&frames, 8.0, Quality::Archive).unwrap()).unwrap();
        let worst = back.data.iter().zip(&frames.data).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= 4, "{color:?}: {worst}");
    }
}

#[test]
fn what_cannot_be_encoded_is_refused_with_the_limit_and_the_value() {
    let blank = |width: usize, height: usize, count: usize| RgbFrames {
        width,
        height,
        count,
        data: vec![0; width * height * count * 3],
    };
    let refused = |frames: &RgbFrames, fps: f64| encode_mp4(frames, fps, Quality::Archive).unwrap_err();
    let odd = refused(&blank(65, 64, 1), 8.0);
    assert_eq!(odd.code(), "odd_size");
    assert!(odd.to_string().contains("65x64") && odd.to_string().contains("64x64"), "{odd}");
    assert_eq!(refused(&blank(8, 64, 1), 8.0).code(), "size_too_small");
    assert_eq!(refused(&blank(3842, 16, 1), 8.0).code(), "size_too_large");
    assert_eq!(refused(&blank(64, 64, 0), 8.0).code(), "no_frames");
    for fps in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(matches!(refused(&blank(64, 64, 1), fps), EncodeError::Rate { .. }));
    }
    let cut = RgbFrames { data: vec![0; 7], ..blank(64, 64, 1) };
    assert_eq!(refused(&cut, 8.0).code(), "frame_length");
}

#[test]
fn a_damaged_clip_is_an_error_and_no_panic() {
    let clip = encode_mp4(&disc(64, 64, 5), 8.0, Quality::Archive).unwrap();
    for end in (0..clip.len()).step_by(37) {
        let _error_or_frames = decode_mp4_bytes(&clip[..end]);
    }
    for at in (0..clip.len()).step_by(11) {
        let mut changed = clip.clone();
        changed[at] ^= 0xff;
        let _error_or_frames = decode_mp4_bytes(&changed);
    }
    assert_eq!(decode_mp4_bytes(b"not a clip at all").unwrap_err().code(), "container");
    assert_eq!(decode_mp4(std::path::Path::new("/nowhere.mp4")).unwrap_err().code(), "read");
}

#[test]
fn pictures_are_written_frame_by_frame_and_as_a_strip() {
    let folder = tempfile::tempdir().unwrap();
    let frames = disc(32, 16, 5);
    let paths = write_pngs(&frames, &folder.path().join("frames")).unwrap();
    let names: Vec<_> =
        paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!((names.len(), names[0].as_str(), names[4].as_str()), (5, "frame-0000.png", "frame-0004.png"));
    let first = image::open(&paths[0]).unwrap().to_rgb8();
    assert_eq!(first.as_raw().as_slice(), frames.frame(0).unwrap());

    let three = strip(&frames, 3).unwrap();
    assert_eq!((three.width, three.height), (96, 16));
    assert_eq!(&three.data[..96], &frames.frame(0).unwrap()[..96]);
    assert_eq!(&three.data[192..288], &frames.frame(4).unwrap()[..96]);
    write_strip(&frames, 8, &folder.path().join("strip.png")).unwrap();
    assert_eq!(image::open(folder.path().join("strip.png")).unwrap().width(), 160);

    assert!(preview_png(&frames, 64 * 1024).is_some());
    assert!(preview_png(&frames, 10).is_none());
}

/// Another decoder sees the same picture. Skipped where there is no ffmpeg.
#[test]
fn another_decoder_sees_the_same_colours() {
    let folder = tempfile::tempdir().unwrap();
    let frames = disc(64, 64, 17);
    let path = folder.path().join("clip.mp4");
    std::fs::write(&path, encode_mp4(&frames, 8.0, Quality::Archive).unwrap()).unwrap();
    let decoded = Command::new("ffmpeg")
        .args(["-v", "error", "-i"])
        .arg(&path)
        .args(["-vf", "scale=flags=full_chroma_int+accurate_rnd", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"])
        .output();
    let Ok(decoded) = decoded else { return };
    assert!(decoded.status.success(), "{}", String::from_utf8_lossy(&decoded.stderr));
    let theirs = RgbFrames { data: decoded.stdout, ..frames.clone() };
    let ours = decode_mp4(&path).unwrap();
    assert!(psnr(&frames, &theirs).unwrap() > 28.0);
    // The decoders differ in how they widen chroma at the disc's edge; a wrong matrix or range would be far below.
    assert!(psnr(&ours, &theirs).unwrap() > 30.0, "{:?}", psnr(&ours, &theirs));
}
