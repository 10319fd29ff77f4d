//! `kinoflock generate`: from words to a file.

use std::io::Read;
use std::path::{Path, PathBuf};

use kinoflock_protocol::limits::MAX_PROMPT;
use kinoflock_protocol::{ClipId, Envelope, JobId, ValidJob};
use serde::Serialize;

use super::args::{Generate, Save, Where};
use super::context::Context;
use super::failure::Failure;
use super::{adapter, audit, batch, follow, latents, many, survey};
use crate::ask::{Ask, Length, Pictures};
use crate::latents::{Latents, MAX_FILE as MAX_LATENTS};
use crate::provenance::{self, Statement};
use crate::session::{Client, Delivered};
use crate::store::JobRecord;
use crate::ticket::Way;

/// Greatest image that is read, in bytes (64 MiB).
const MAX_IMAGE: u64 = 64 << 20;
/// How a PNG and a JPEG begin.
const IMAGE_MARKS: [&[u8]; 2] = [b"\x89PNG\r\n", b"\xff\xd8\xff"];

#[derive(Serialize)]
struct Saved<'a> {
    event: &'static str,
    job: JobId,
    clip: ClipId,
    file: Option<&'a Path>,
    latents: Option<&'a Path>,
    seed: String,
}

#[derive(Serialize)]
struct Handed {
    event: &'static str,
    job: JobId,
}

pub(super) async fn run(args: Generate, context: &Context<'_>) -> Result<(), Failure> {
    refuse_what_is_not_there(&args)?;
    if let Some(file) = &args.batch {
        return batch::run(file, &args, context).await;
    }
    check_place(&args.save, context)?;
    let ask = ask(&args, context)?;
    ask.check()?;
    if let Some(count) = args.variations {
        return many::variations(count, ask, &args, context).await;
    }
    if !args.dry_run && !args.detach {
        return one(ask, &args.at, args.timeout, &args.save, context).await;
    }
    let client = context.client().await?;
    let (ways, pinned) = context.ways(&client, &args.at)?;
    let ask = Ask { pinned, ..ask };
    if args.dry_run {
        return survey::run(&ask, &ways, context, &client).await;
    }
    let record = submit(&ask, &ways, context, &client).await?;
    context.out.words(&format!("handed over; fetch the clip with: kinoflock wait {}", record.job.short()));
    context.out.line(&record.job.to_string());
    context.out.record(&Handed { event: "detached", job: record.job });
    client.stop().await;
    Ok(())
}

/// One job from its order to its saved clip.
pub(super) async fn one(
    ask: Ask,
    at: &Where,
    timeout: Option<u64>,
    place: &Save,
    context: &Context<'_>,
) -> Result<(), Failure> {
    let client = context.client().await?;
    let (ways, pinned) = context.ways(&client, at)?;
    let ask = Ask { pinned, ..ask };
    let record = submit(&ask, &ways, context, &client).await?;
    let delivered = follow::job(context, &client, record.job, &ways, timeout).await?;
    let saved = save(&delivered, &client, place, context).map(drop);
    audit::after(&client, &delivered.record.job, context).await;
    client.stop().await;
    saved
}

/// Saves a delivered clip, and its latents if they came, and says where.
pub(super) fn save(
    delivered: &Delivered,
    client: &Client,
    save: &Save,
    context: &Context<'_>,
) -> Result<Option<PathBuf>, Failure> {
    let bare = client.store().read_blob(&delivered.clip.into())?;
    let record = &delivered.record;
    let file = write(&bare, Some(record), delivered.clip, save, context)?;
    let latents = match (client.latents_path(record), &file) {
        (Some(from), Some(file)) => {
            let to = file.with_extension("latents.safetensors");
            std::fs::copy(&from, &to).map_err(|error| Failure::file("write", &to, &error))?;
            context.out.words(&format!("latents: {}", to.display()));
            Some(to)
        }
        _ => None,
    };
    let (job, clip) = (record.job, delivered.clip);
    let seed = delivered.receipt.receipt().seed.to_string();
    let saved = Saved { event: "saved", job, clip, file: file.as_deref(), latents: latents.as_deref(), seed };
    context.out.record(&saved);
    Ok(file)
}

/// Writes a clip where the flags say; with its provenance, if its job is known. Prints the file's name.
pub(super) fn write(
    bare: &[u8],
    record: Option<&JobRecord>,
    clip: ClipId,
    save: &Save,
    context: &Context<'_>,
) -> Result<Option<PathBuf>, Failure> {
    let cards = record.map_or_else(Vec::new, |record| cards_of(record, context));
    let exported = match record.and_then(|record| Some((record, record.receipt.as_ref()?))) {
        Some((record, receipt)) if !save.bare => {
            let statement = Statement {
                network: record.network,
                receipt,
                answer: record.answer.as_ref(),
                job: &record.envelope,
                model_name: &record.model_name,
                with_prompt: save.with_prompt,
                cards: &cards,
            };
            Some(provenance::export(bare, &statement)?)
        }
        _ => None,
    };
    let bytes = exported.as_deref().unwrap_or(bare);
    if save.output.as_deref() == Some(Path::new("-")) {
        context.out.bytes(bytes);
        return Ok(None);
    }
    let path = save.output.clone().unwrap_or_else(|| PathBuf::from(crate::file_name(&clip)));
    write_file(&path, bytes).map_err(|failure| {
        failure.and(&format!("the clip is kept, save it with: kinoflock get {} -o FILE", clip.short()))
    })?;
    context.out.line(&path.display().to_string());
    Ok(Some(path))
}

/// The cards of a job's adapters, as far as they are here.
pub(super) fn cards_of(record: &JobRecord, context: &Context<'_>) -> Vec<Envelope> {
    let spec = ValidJob::parse_stored(&record.envelope, &record.network).map(ValidJob::into_spec);
    let Some((spec, store)) = spec.ok().zip(context.store().ok()) else { return Vec::new() };
    spec.adapters.iter().filter_map(|adapter| store.card(&adapter.card?).ok().flatten()).collect()
}

/// Says what stands against saving a clip where the flags say, before anything is made.
pub(super) fn check_place(save: &Save, context: &Context<'_>) -> Result<(), Failure> {
    let Some(path) = save.output.as_deref() else { return Ok(()) };
    let shown = path.display();
    if path == Path::new("-") {
        if context.out.is_json() {
            return Err(Failure::usage("-o - and --json both want standard output; give a file name"));
        }
        return Ok(());
    }
    if path.is_dir() {
        return Err(Failure::usage(format!("{shown} is a folder; give the name of a file in it")));
    }
    match path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
        Some(folder) => Err(Failure::usage(format!(
            "{shown} cannot be written: there is no folder {}; make it first",
            folder.display()
        ))),
        None => Ok(()),
    }
}

/// Beside its place first, so that a full disk does not leave half a clip under its name.
fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", crate::store::unique()));
    let temporary = path.with_file_name(name);
    let written = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|error| {
        // What could not be written is of no use.
        let _ = std::fs::remove_file(&temporary);
        Failure::file("write", path, &error)
    })
}

async fn submit(
    ask: &Ask,
    ways: &[Way],
    context: &Context<'_>,
    client: &Client,
) -> Result<JobRecord, Failure> {
    let (events, told) = Client::events();
    let mut progress = context.out.progress();
    follow::show_while(client.submit(ask, ways, &events), told, &mut progress).await
}

pub(super) fn refuse_what_is_not_there(args: &Generate) -> Result<(), Failure> {
    let flags = [("--collective", args.collective.is_some(), "collectives")];
    match flags.into_iter().find(|(_, given, _)| *given) {
        Some((flag, _, what)) => {
            let text =
                format!("{flag} is not there yet: this release does not know {what}; nothing was sent");
            Err(Failure::new(super::Exit::Usage, "not_there_yet", text))
        }
        None => Ok(()),
    }
}

pub(super) fn ask(args: &Generate, context: &Context<'_>) -> Result<Ask, Failure> {
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(path)) => read_prompt(path)?,
        (None, None) => return Err(Failure::usage("a prompt is missing")),
    };
    let length = args.frames.map(Length::Frames).or(args.seconds.map(Length::Seconds));
    let given = args.init_latents.as_deref().map(Path::to_string_lossy);
    let initial_latents = given.map(|given| latents::read(&given, context)).transpose()?;
    let volume = initial_latents.as_deref().and_then(|bytes| Latents::parse(bytes).ok()?.volume());
    let ops = args.set.iter().cloned().chain(args.touch.ops()?).collect();
    let pictures = pictures(args, context)?;
    Ok(Ask {
        model: args.model.clone().or_else(|| context.config.model.clone()),
        prompt,
        negative_prompt: args.negative.clone(),
        seed: args.seed,
        length,
        size: args.size,
        fps: args.fps,
        steps: args.steps,
        guidance: args.guidance,
        ops,
        initial_latents,
        volume,
        pictures,
        adapters: adapter::asked(&args.lora, context)?,
        latents: args.latents,
        artist: context.config.artist.clone(),
        licence: args.licence.clone().or_else(|| context.config.licence.clone()),
        require_terms: args.require_terms,
        custodians: args.custodians.map(usize::from),
        share: args.share,
        audit_share: context.config.audit_share,
        ..Ask::default()
    })
}

fn pictures(args: &Generate, context: &Context<'_>) -> Result<Pictures, Failure> {
    let image = |path: &Option<PathBuf>| path.as_deref().map(read_image).transpose();
    let keyframe = |(frame, path): &(u32, PathBuf)| Ok((*frame, read_image(path)?));
    let extend = |text: &String| -> Result<Vec<u8>, Failure> {
        let store = context.store()?;
        Ok(store.read_blob(&store.find_clip(text)?.into())?)
    };
    Ok(Pictures {
        start: image(&args.image)?,
        end: image(&args.end_image)?,
        keyframes: args.keyframe.iter().map(keyframe).collect::<Result<_, Failure>>()?,
        extend: args.extend.as_ref().map(extend).transpose()?,
    })
}

fn read_image(path: &Path) -> Result<Vec<u8>, Failure> {
    let bytes = read_file(path, "an image", MAX_IMAGE)?;
    let is_known = IMAGE_MARKS.iter().any(|mark| bytes.starts_with(mark));
    match is_known {
        true => Ok(bytes),
        false => Err(Failure::usage(format!("{} is neither PNG nor JPEG", path.display()))),
    }
}

/// A prompt from a file; one line's end at the end is the editor's, not the artist's.
fn read_prompt(path: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    let limit = MAX_PROMPT as u64 + 2;
    let read = if path == Path::new("-") {
        std::io::stdin().take(limit).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(limit).read_to_string(&mut text))
    };
    read.map_err(|error| Failure::file("read the prompt from", path, &error))?;
    let text = text.strip_suffix('\n').map_or(text.as_str(), |text| text.strip_suffix('\r').unwrap_or(text));
    Ok(text.to_owned())
}

pub(super) fn read_latents(path: &Path) -> Result<Vec<u8>, Failure> {
    read_file(path, "latents", MAX_LATENTS)
}

fn read_file(path: &Path, what: &str, limit: u64) -> Result<Vec<u8>, Failure> {
    let fault = |error: std::io::Error| Failure::file("read", path, &error);
    let given = std::fs::metadata(path).map_err(fault)?.len();
    if given > limit {
        return Err(Failure::usage(format!("{} has {given} bytes, {what} may have {limit}", path.display())));
    }
    std::fs::read(path).map_err(fault)
}
