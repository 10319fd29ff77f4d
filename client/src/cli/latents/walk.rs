//! `kinoflock latents walk`: a clip for each point on the way from one seed, prompt or file of noise to another.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use kinoflock_protocol::Micro;
use kinoflock_protocol::job::OpValue;

use super::super::args::{Generate, Save};
use super::super::context::Context;
use super::super::failure::Failure;
use super::super::many::{self, Manner, Outcome, READABLE_SEEDS, Task};
use super::super::{audit, generate, touch};
use super::{fault, make_folder, numbered, read};
use crate::ask::Ask;
use crate::latents::{Latents, Way};
use crate::output::many::Label;

/// The list of the clips in their order, as ffmpeg reads it.
const LIST: &str = "walk.txt";
/// The folder where none is named.
const FOLDER: &str = "walk";

/// From one end to the other. Everything that `generate` knows can be said too.
#[derive(Debug, Args)]
pub struct Walk {
    /// How many clips, both ends included
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=64))]
    pub clips: u32,
    /// From the noise of --seed to that of this seed
    #[arg(long, value_name = "SEED", required_unless_present_any = ["to_prompt", "to_latents"])]
    pub to_seed: Option<u64>,
    /// From the prompt to this one
    #[arg(long, value_name = "TEXT")]
    pub to_prompt: Option<String>,
    /// From the file of --init-latents to this one
    #[arg(long, value_name = "FILE", requires = "init_latents", conflicts_with = "to_seed")]
    pub to_latents: Option<String>,
    /// On a line where the way would be an arc (noise), on an arc where it would be a line (prompts)
    #[arg(long)]
    pub other_way: bool,
    /// What is the same for all.
    #[command(flatten)]
    pub generate: Generate,
}

pub(super) async fn run(args: Walk, context: &Context<'_>) -> Result<(), Failure> {
    refuse_what_has_no_place(&args)?;
    let folder = args.generate.save.output.clone().unwrap_or_else(|| PathBuf::from(FOLDER));
    let seed = match args.generate.seed {
        Some(seed) => seed,
        None => crate::session::random()? % READABLE_SEEDS,
    };
    let base = Ask { seed: Some(seed), ..generate::ask(&args.generate, context)? };
    let ends = Ends::of(&args, context)?;
    let all = 0..args.clips;
    let mut tasks: Vec<Task> = all.map(|index| task(index, &args, &base, &ends, &folder)).collect();
    tasks.iter().try_for_each(|task| task.ask.check())?;
    make_folder(&folder)?;
    let client = context.client().await?;
    let (ways, pinned) = context.ways(&client, &args.generate.at)?;
    tasks.iter_mut().for_each(|task| task.ask.pinned = pinned);
    let manner = Manner {
        ways: &ways,
        in_flight: args.generate.in_flight as usize,
        timeout: args.generate.timeout,
        left: "fetch each clip with: kinoflock wait JOB",
    };
    let started = Instant::now();
    let outcomes = many::run(&tasks, &manner, context, &client).await?;
    audit::after_many(&client, many::jobs_of(&outcomes), context).await;
    client.stop().await;
    list(&outcomes, &folder, context)?;
    many::summary(&tasks, &outcomes, started, context)
}

fn refuse_what_has_no_place(args: &Walk) -> Result<(), Failure> {
    generate::refuse_what_is_not_there(&args.generate)?;
    let given = &args.generate;
    let flags = [
        ("--batch", given.batch.is_some()),
        ("--variations", given.variations.is_some()),
        ("--dry-run", given.dry_run),
        ("--detach", given.detach),
        ("--mix-seed", args.to_seed.is_some() && given.touch.mix_seed.is_some()),
        ("--mix-prompt", args.to_prompt.is_some() && given.touch.mix_prompt.is_some()),
        ("-o -", given.save.output.as_deref() == Some(Path::new("-"))),
    ];
    match flags.into_iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(Failure::usage(format!("{flag} has no place in a walk"))),
        None => Ok(()),
    }
}

/// Two files between which there is a way.
struct Ends(Option<[Latents; 2]>);

impl Ends {
    fn of(args: &Walk, context: &Context<'_>) -> Result<Self, Failure> {
        let (Some(from), Some(to)) = (&args.generate.init_latents, &args.to_latents) else {
            return Ok(Self(None));
        };
        let open = |given: &str| -> Result<Latents, Failure> {
            Latents::parse(&read(given, context)?).map_err(|error| fault(given, &error))
        };
        let ends = [open(&from.to_string_lossy())?, open(to)?];
        // Said before anything is made.
        ends[0].mix(&ends[1], 1.0, Way::Line).map_err(|error| fault(to, &error))?;
        Ok(Self(Some(ends)))
    }

    fn at(&self, weight: f64, way: Way) -> Option<Vec<u8>> {
        let [first, second] = self.0.as_ref()?;
        first.mix(second, weight, way).and_then(|mixed| mixed.to_bytes()).ok()
    }
}

fn task(index: u32, args: &Walk, base: &Ask, ends: &Ends, folder: &Path) -> Task {
    let part = i64::from(index) * Micro::ONE.0 / i64::from(args.clips - 1);
    let weight = Micro(part);
    let mut ask = base.clone();
    if let Some(seed) = args.to_seed {
        ask.ops.extend(touch::second_seed(seed, weight, args.other_way));
    }
    if let Some(prompt) = &args.to_prompt {
        ask.ops.extend(touch::second_prompt(prompt, weight));
        if args.other_way {
            ask.ops.push(("prompt.spherical".to_owned(), OpValue::Flag(true)));
        }
    }
    let way = if args.other_way { Way::Line } else { Way::Arc };
    if let Some(latents) = ends.at(weight.to_f64(), way) {
        ask.initial_latents = Some(latents);
    }
    let file = folder.join(format!("walk-{}.mp4", numbered(index, args.clips)));
    let save = Save { output: Some(file), ..args.generate.save.clone() };
    Task { label: Label::Clip(index as usize), ask, save, key: None, before: None }
}

/// Writes the list of the clips that came.
fn list(outcomes: &[Outcome], folder: &Path, context: &Context<'_>) -> Result<(), Failure> {
    let files = outcomes.iter().filter_map(|outcome| outcome.made.as_ref().ok()?.file.as_ref()?.file_name());
    let lines: String = files.map(|name| format!("file '{}'\n", name.to_string_lossy())).collect();
    let path = folder.join(LIST);
    std::fs::write(&path, lines).map_err(|error| Failure::file("write", &path, &error))?;
    let (shown, folder) = (path.display(), folder.display());
    context.out.words(&format!("in one clip: ffmpeg -f concat -i {shown} -c copy {folder}.mp4"));
    Ok(())
}
