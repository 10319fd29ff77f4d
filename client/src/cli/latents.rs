//! `kinoflock latents`: look at files of latents, mix them, walk between seeds, prompts and latents, decode them.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use kinoflock_protocol::Micro;
use kinoflock_protocol::job::OpValue;
use serde::Serialize;

use super::args::{Save, Where, number, operation, size};
use super::context::Context;
use super::failure::{Exit, Failure};
use super::generate;
use crate::ask::{Ask, Length};
use crate::latents::{Latents, LatentsError, Way};
use crate::output::table::{self, Column};

mod walk;

/// Most files or clips between two ends, both counted.
const MAX_POINTS: u32 = 1024;

/// What to do with latents.
#[derive(Debug, Subcommand)]
pub enum LatentsCommand {
    /// What a file holds: shapes, and what the numbers are like
    Show {
        /// The file, or a clip of yours whose latents came with it
        file: String,
    },
    /// Files on the way from one to another, both ends included; nothing is sent
    Interpolate {
        /// The first file, or a clip of yours whose latents came with it
        first: String,
        /// The second
        second: String,
        /// How many files
        #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=i64::from(MAX_POINTS)))]
        steps: u32,
        /// Along an arc instead of a line: right for noise
        #[arg(long)]
        spherical: bool,
        /// The folder for them; it is made where it is not there
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
    },
    /// Clips on the way from one seed, prompt or file of noise to another
    #[command(after_help = WALK_EXAMPLES)]
    Walk(Box<walk::Walk>),
    /// Send latents through the VAE of a model alone: no prompt, no step
    Decode(Box<Decode>),
}

const WALK_EXAMPLES: &str = "\
Examples:
  kinoflock latents walk \"a red circle\" --seed 1 --to-seed 2 --clips 8 -o walk
  kinoflock latents walk \"a red circle\" --seed 1 --to-prompt \"a blue square\" -o walk
  kinoflock latents walk \"a red circle\" --init-latents a.safetensors --to-latents b.safetensors -o walk
One clip of them all, with ffmpeg: ffmpeg -f concat -i walk/walk.txt -c copy walk.mp4";

/// Latents to decode.
#[derive(Debug, Args)]
pub struct Decode {
    /// The file, or a clip of yours whose latents came with it
    pub file: String,
    /// Model: a name or an id [default: the only one offered]
    #[arg(short, long)]
    pub model: Option<String>,
    /// Seed of the noise that some decoders add [default: random]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Size in pixels, such as 768x512 [default: the latents']
    #[arg(long, value_name = "WxH", value_parser = size)]
    pub size: Option<(u32, u32)>,
    /// Number of frames [default: the latents']
    #[arg(long)]
    pub frames: Option<u32>,
    /// Frames per second
    #[arg(long, value_parser = number)]
    pub fps: Option<Micro>,
    /// A further operation by name, such as channels.scale=0.5; kinoflock ops lists them
    #[arg(long, value_name = "K=V", value_parser = operation, allow_hyphen_values = true)]
    pub set: Vec<(String, OpValue)>,
    /// Which node is to do it.
    #[command(flatten)]
    pub at: Where,
    /// Give up waiting after so many seconds; the job goes on
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// How the clip is saved.
    #[command(flatten)]
    pub save: Save,
}

pub(super) async fn run(command: LatentsCommand, context: &Context<'_>) -> Result<(), Failure> {
    match command {
        LatentsCommand::Show { file } => show(&file, context),
        LatentsCommand::Interpolate { first, second, steps, spherical, output } => {
            interpolate([&first, &second], steps, spherical, &output, context)
        }
        LatentsCommand::Walk(walk) => walk::run(*walk, context).await,
        LatentsCommand::Decode(decode) => self::decode(*decode, context).await,
    }
}

#[derive(Serialize)]
struct Row<'a> {
    event: &'static str,
    tensor: &'a str,
    shape: &'a [usize],
    mean: f64,
    deviation: f64,
    least: f32,
    greatest: f32,
    not_finite: usize,
}

fn show(file: &str, context: &Context<'_>) -> Result<(), Failure> {
    let latents = open(file, context)?;
    let columns = [
        Column::Left("tensor"),
        Column::Left("shape"),
        Column::Right("mean"),
        Column::Right("deviation"),
        Column::Right("least"),
        Column::Right("greatest"),
        Column::Right("no numbers"),
    ];
    let mut rows = Vec::new();
    for (name, tensor) in &latents.0 {
        let found = tensor.statistics();
        context.out.record(&Row {
            event: "tensor",
            tensor: name,
            shape: &tensor.shape,
            mean: found.mean,
            deviation: found.deviation,
            least: found.least,
            greatest: found.greatest,
            not_finite: found.not_finite,
        });
        let number = |value: f64| format!("{value:.4}");
        let shape = tensor.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join("x");
        let ends = [number(f64::from(found.least)), number(f64::from(found.greatest))];
        let [least, greatest] = ends;
        let (mean, deviation) = (number(found.mean), number(found.deviation));
        rows.push(vec![name.clone(), shape, mean, deviation, least, greatest, found.not_finite.to_string()]);
    }
    table::lines(&columns, &rows).iter().for_each(|line| context.out.line(line));
    Ok(())
}

#[derive(Serialize)]
struct Point<'a> {
    event: &'static str,
    weight: f64,
    file: &'a Path,
}

fn interpolate(
    ends: [&str; 2],
    steps: u32,
    spherical: bool,
    folder: &Path,
    context: &Context<'_>,
) -> Result<(), Failure> {
    let [first, second] = [open(ends[0], context)?, open(ends[1], context)?];
    let way = if spherical { Way::Arc } else { Way::Line };
    make_folder(folder)?;
    for index in 0..steps {
        let weight = f64::from(index) / f64::from(steps - 1);
        let mixed = first.mix(&second, weight, way).and_then(|mixed| mixed.to_bytes());
        let bytes = mixed.map_err(|error| fault(ends[1], &error))?;
        let file = folder.join(format!("latents-{}.safetensors", numbered(index, steps)));
        std::fs::write(&file, bytes).map_err(|error| Failure::file("write", &file, &error))?;
        context.out.line(&file.display().to_string());
        context.out.record(&Point { event: "latents", weight, file: &file });
    }
    Ok(())
}

async fn decode(args: Decode, context: &Context<'_>) -> Result<(), Failure> {
    generate::check_place(&args.save, context)?;
    let bytes = read(&args.file, context)?;
    let latents = Latents::parse(&bytes).map_err(|error| fault(&args.file, &error))?;
    let mut ops = args.set;
    ops.push(("decode_only".to_owned(), OpValue::Flag(true)));
    let ask = Ask {
        model: args.model.or_else(|| context.config.model.clone()),
        seed: args.seed,
        size: args.size,
        length: args.frames.map(Length::Frames),
        fps: args.fps,
        ops,
        volume: latents.volume(),
        initial_latents: Some(bytes),
        artist: context.config.artist.clone(),
        licence: context.config.licence.clone(),
        ..Ask::default()
    };
    generate::one(ask, &args.at, args.timeout, &args.save, context).await
}

/// A file of latents, or those that came with one of the artist's clips.
pub(super) fn read(given: &str, context: &Context<'_>) -> Result<Vec<u8>, Failure> {
    let path = Path::new(given);
    if path.exists() {
        return generate::read_latents(path);
    }
    let store = context.store()?;
    let Ok(clip) = store.find_clip(given) else { return generate::read_latents(path) };
    // Several jobs may have made the same clip, and not all of them brought its latents.
    for entry in store.jobs()?.into_iter().filter(|entry| entry.clip == Some(clip)) {
        if let Some(latents) = store.job(&entry.job)?.latents
            && store.has_blob(&latents.id)
        {
            return Ok(store.read_blob(&latents.id)?);
        }
    }
    let text = format!("clip {} came without its latents: --latents asks for them too", clip.short());
    Err(Failure::new(Exit::Usage, "latents", text))
}

fn open(given: &str, context: &Context<'_>) -> Result<Latents, Failure> {
    Latents::parse(&read(given, context)?).map_err(|error| fault(given, &error))
}

/// What is wrong with a file of latents.
pub(super) fn fault(given: &str, error: &LatentsError) -> Failure {
    Failure::new(Exit::Usage, "latents", format!("{given}: {error}"))
}

fn make_folder(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(|error| Failure::file("make", folder, &error))
}

/// A number with as many digits as the last one has.
fn numbered(index: u32, count: u32) -> String {
    let digits = count.saturating_sub(1).to_string().len();
    format!("{index:0digits$}")
}
