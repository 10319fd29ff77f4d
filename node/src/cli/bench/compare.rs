//! `kinoflockd bench --compare`: a step and a decode of two published models with random weights, here and by the
//! reference implementation on the same device, in one table.
//!
//! The reference is a Python script that is a part of this program. Both build their models from the same configuration
//! and take the least of several runs, one after the other, so that neither has the device while the other is measured.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::Context;
use clap::Args;
use kinoflock_inference::measure::{FPS, Family, Figures, Size, Subject, subjects};
use kinoflock_inference::{DType, open_device};
use serde::Deserialize;

use crate::cli::say;

/// The reference's side.
const SCRIPT: &str = include_str!("reference.py");

/// Flags of `bench --compare`.
#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Time LTX-Video 2B and Wan 2.1 1.3B with random weights, here and in Python's diffusers on the same device.
    #[arg(long)]
    pub(super) compare: bool,
    /// Device of --compare: cpu, cuda:N.
    #[arg(long, requires = "compare", value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Number format of --compare.
    #[arg(long, requires = "compare", value_name = "NAME", default_value = "bf16",
        value_parser = ["bf16", "f16", "f32"])]
    dtype: String,
    /// Pixels of the clip of --compare, such as 256x256, instead of 768x512 and 832x480.
    #[arg(long, requires = "compare", value_name = "WxH", value_parser = parse_size)]
    size: Option<(usize, usize)>,
    /// Frames of the clip of --compare, instead of 97 and 81.
    #[arg(long, requires = "compare", value_name = "N")]
    frames: Option<usize>,
    /// Small models of the same forms for --compare, to try the way.
    #[arg(long, requires = "compare")]
    small: bool,
    /// Leave the compiled reference out of --compare: torch.compile takes minutes on small machines.
    #[arg(long, requires = "compare")]
    no_compile: bool,
    /// Python with torch and diffusers, for --compare.
    #[arg(long, requires = "compare", value_name = "PROGRAM", default_value = "python3")]
    python: String,
}

fn parse_size(text: &str) -> Result<(usize, usize), String> {
    let sides = text.split_once(['x', 'X']).and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    sides.ok_or_else(|| format!("{text:?} is no size such as 768x512"))
}

/// A line of the reference's answer.
#[derive(Debug, Deserialize)]
struct Row {
    way: String,
    step_s: f64,
    decode_s: f64,
    torch: String,
    diffusers: String,
}

pub(super) fn run(args: &CompareArgs, runs: usize, json: bool) -> anyhow::Result<()> {
    let subjects = subjects(args.small);
    let sizes = subjects.each_ref().map(|subject| size_of(args, subject));
    // What cannot be made, or cannot be compared, is said before minutes are spent on the first model.
    for (subject, size) in subjects.iter().zip(sizes) {
        subject.check(size)?;
    }
    ask_for_reference(&args.python)?;
    let device = open_device(&args.device)?;
    let dtype = match args.dtype.as_str() {
        "f32" => DType::F32,
        "f16" => DType::F16,
        _ => DType::BF16,
    };
    for (index, (subject, size)) in subjects.iter().zip(sizes).enumerate() {
        say::words(&format!("{}: measuring here", subject.name));
        let ours = subject.measure(size, &device, dtype, runs)?;
        say::words(&format!("{}: measuring the reference", subject.name));
        let theirs = reference(args, subject, size, runs)?;
        show(args, subject, size, ours, &theirs, json, index == 0);
    }
    Ok(())
}

fn size_of(args: &CompareArgs, subject: &Subject) -> Size {
    let own = subject.size;
    let (width, height) = args.size.unwrap_or((own.width, own.height));
    Size { width, height, frames: args.frames.unwrap_or(own.frames) }
}

/// Whether Python is there with what the reference needs.
fn ask_for_reference(python: &str) -> anyhow::Result<()> {
    const PACKAGES: &str = "pip install torch==2.7.1 diffusers==0.36.0 transformers==4.57.6";
    let asked = Command::new(python)
        .args(["-c", "import torch, diffusers"])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{python} cannot be started: --compare needs Python with {PACKAGES}"))?;
    let said = String::from_utf8_lossy(&asked.stderr);
    let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    anyhow::ensure!(asked.status.success(), "{python} has not what the reference needs ({last}): {PACKAGES}");
    Ok(())
}

/// The reference's figures.
fn reference(args: &CompareArgs, subject: &Subject, size: Size, runs: usize) -> anyhow::Result<Vec<Row>> {
    let family = match subject.family {
        Family::Ltx => "ltx",
        Family::Wan => "wan",
    };
    let dtype = match args.dtype.as_str() {
        "f32" => "float32",
        "f16" => "float16",
        _ => "bfloat16",
    };
    let job = serde_json::json!({
        "device": args.device, "dtype": dtype, "runs": runs, "family": family, "fps": FPS,
        "transformer": subject.transformer, "vae": subject.vae, "text_tokens": subject.text_tokens,
        "width": size.width, "height": size.height, "frames": size.frames, "compile": !args.no_compile,
    });
    let script = tempfile::Builder::new().suffix(".py").tempfile()?;
    script.as_file().write_all(SCRIPT.as_bytes())?;
    let mut child = Command::new(&args.python)
        .arg(script.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} cannot be started", args.python))?;
    if let Some(mut input) = child.stdin.take() {
        // A reference that ends before it reads tells why on its own error output.
        let _ = input.write_all(job.to_string().as_bytes());
    }
    let answer = child.wait_with_output()?;
    anyhow::ensure!(answer.status.success(), "the reference for {} failed ({})", subject.name, answer.status);
    let text = String::from_utf8(answer.stdout).context("the reference answered no text")?;
    let rows = text.lines().filter(|line| line.starts_with('{')).map(serde_json::from_str);
    let rows = rows.collect::<Result<Vec<Row>, _>>().context("the reference answered something else")?;
    let wanted = if args.no_compile { 1 } else { 2 };
    anyhow::ensure!(rows.len() == wanted, "the reference answered {} of {wanted} ways", rows.len());
    Ok(rows)
}

fn show(
    args: &CompareArgs,
    subject: &Subject,
    size: Size,
    ours: Figures,
    theirs: &[Row],
    json: bool,
    first: bool,
) {
    let clip = format!("{}x{}x{}", size.width, size.height, size.frames);
    if json {
        let ways = theirs.iter().map(|row| {
            serde_json::json!({
                "way": row.way, "step_s": row.step_s, "decode_s": row.decode_s, "torch": row.torch,
                "diffusers": row.diffusers,
            })
        });
        let row = serde_json::json!({
            "schema": 1, "device": args.device, "dtype": args.dtype, "model": subject.name, "clip": clip,
            "step_s": ours.step, "decode_s": ours.decode, "reference": ways.collect::<Vec<_>>(),
        });
        return say::data(&row.to_string());
    }
    if first {
        let row = &theirs[0];
        say::data(&format!(
            "| {}, {}, seconds | here | diffusers {} (torch {}) | compiled | here / best |\n|---|---|---|---|---|",
            args.device, args.dtype, row.diffusers, row.torch
        ));
    }
    line(subject, &clip, "guided step", ours.step, &theirs.iter().map(|row| row.step_s).collect::<Vec<_>>());
    line(subject, &clip, "decode", ours.decode, &theirs.iter().map(|row| row.decode_s).collect::<Vec<_>>());
}

/// One line of the table; `theirs` is the reference as it comes and, where that was asked for, compiled.
fn line(subject: &Subject, clip: &str, what: &str, ours: f64, theirs: &[f64]) {
    let way = |index: usize| theirs.get(index).map_or("not asked".to_owned(), |took| format!("{took:.3}"));
    let (eager, compiled, name) = (way(0), way(1), subject.name);
    let ratio = ours / theirs.iter().copied().fold(f64::INFINITY, f64::min);
    say::data(&format!("| {name} {clip}, {what} | {ours:.3} | {eager} | {compiled} | {ratio:.2} |"));
}
