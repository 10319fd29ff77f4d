//! `ls`, `get`, `share`, `rm`, `show`, `verify`.

use std::path::Path;

use kinoflock_protocol::card::Subject;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::names::CLIP_TICKET;
use kinoflock_protocol::receipt::{Receipt, UsedAdapter, Verdict};
use kinoflock_protocol::{ClipId, JobId, JobSpec, Prompt, ValidJob};
use serde::Serialize;

use super::adapter::AdapterFacts;
use super::args::Save;
use super::context::Context;
use super::failure::{Exit, Failure};
use super::jobs::short_time;
use super::ticket::Told;
use super::{follow, generate};
use crate::provenance::{self, Cited, ProvenanceError, Verified, network_name};
use crate::session::Client;
use crate::store::{JobRecord, Store, StoreError};
use crate::ticket::{Way, clip_ticket};
use crate::verify::MAX_CLIP_BYTES;

#[derive(Serialize)]
struct Saved<'a> {
    event: &'static str,
    clip: ClipId,
    file: Option<&'a Path>,
}

/// What is known of a clip, for programs.
#[derive(Serialize)]
struct Facts {
    verified: bool,
    network: String,
    clip: ClipId,
    job: JobId,
    node: String,
    requester: String,
    model: String,
    model_name: String,
    seed: String,
    steps: u32,
    made_at: String,
    device: &'static str,
    engine: String,
    adapters: Vec<AdapterFacts>,
    frames: Option<u32>,
    width: Option<u32>,
    height: Option<u32>,
    fps: Option<String>,
    guidance: Option<String>,
    prompt: Option<String>,
    negative_prompt: Option<String>,
    prompt_is_signed: bool,
    artist: Option<String>,
    licence: Option<String>,
    answer: Option<&'static str>,
}

pub(super) fn ls(context: &Context<'_>) -> Result<(), Failure> {
    let clips = context.store()?.clips()?;
    if clips.is_empty() {
        context.out.words("no clips yet; make one with: kinoflock generate \"PROMPT\"");
    }
    for clip in &clips {
        context.out.record(clip);
        let here = if clip.here { "here" } else { "not here" };
        let model = if clip.model_name.is_empty() { "by ticket" } else { &clip.model_name };
        let (id, when, len) = (clip.clip.short(), short_time(clip.created_at), clip.len);
        context.out.line(&format!("{id}  {when}  {len:>10} bytes  {here:<8}  {model}"));
    }
    Ok(())
}

pub(super) async fn get(text: &str, save: &Save, context: &Context<'_>) -> Result<(), Failure> {
    generate::check_place(save, context)?;
    let store = context.store()?;
    let clip = if text.starts_with(CLIP_TICKET) {
        fetch_ticket(text, context).await?
    } else {
        store.find_clip(text)?
    };
    let bare = match store.read_blob(&clip.into()) {
        Err(StoreError::NotFound { .. } | StoreError::Damaged { .. }) => {
            fetch_again(&store, &clip, context).await?;
            store.read_blob(&clip.into())?
        }
        other => other?,
    };
    let record = store.job_of_clip(&clip)?;
    let file = generate::write(&bare, record.as_ref(), clip, save, context)?;
    context.out.record(&Saved { event: "saved", clip, file: file.as_deref() });
    Ok(())
}

async fn fetch_ticket(text: &str, context: &Context<'_>) -> Result<ClipId, Failure> {
    let ticket: kinoflock_protocol::names::ClipTicket =
        text.trim().parse().map_err(crate::ticket::WayError::from)?;
    if ticket.network != context.config.network {
        let (given, here) = (ticket.network, context.config.network);
        return Err(crate::ticket::WayError::OtherNetwork { given, here }.into());
    }
    let client = context.client().await?;
    let (events, told) = Client::events();
    let mut progress = context.out.progress();
    follow::show_while(client.fetch_ticket(&ticket, &events), told, &mut progress).await?;
    client.stop().await;
    Ok(ticket.clip)
}

/// Fetches a clip that is known but not here: from the node that made it, or by the ticket that it came by.
async fn fetch_again(store: &Store, clip: &ClipId, context: &Context<'_>) -> Result<(), Failure> {
    if let Some(record) = store.job_of_clip(clip)? {
        let client = context.client().await?;
        let (events, told) = Client::events();
        let mut progress = context.out.progress();
        let (node, addresses) = match Way::to_node_of(&record) {
            Way::Node(node, addresses) => (node, addresses),
            _ => (record.node, Vec::new()),
        };
        client.net().add_addresses(node, addresses).await.map_err(crate::session::SessionError::from)?;
        let blob = record.clip.unwrap_or(BlobRef { id: (*clip).into(), len: MAX_CLIP_BYTES });
        let holders = [node];
        follow::show_while(client.fetch_to_store(&blob, &holders, &events), told, &mut progress).await?;
        client.stop().await;
        return Ok(());
    }
    match store.clip_record(clip)? {
        Some(known) => fetch_ticket(&known.ticket, context).await.map(drop),
        None => {
            let text = format!("clip {clip} is not here and nobody is known who has it; ask for a ticket");
            Err(Failure::new(Exit::NoNode, "clip_unknown", text))
        }
    }
}

pub(super) fn share(text: &str, context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let clip = store.find_clip(text)?;
    let ticket = match (store.job_of_clip(&clip)?, store.clip_record(&clip)?) {
        (Some(record), _) => {
            let len = record.clip.map_or(0, |clip| clip.len);
            clip_ticket(record.network, clip, len, &[(record.node, record.addresses)]).to_string()
        }
        (None, Some(known)) => known.ticket,
        (None, None) => {
            let text = format!("clip {clip} is not in your store, so it is not known who has it");
            return Err(Failure::new(Exit::Usage, "not_found", text));
        }
    };
    context.out.words(
        "whoever has this ticket can fetch the clip, for as long as the node that made it keeps it; later, send the file",
    );
    context.out.line(&ticket);
    context.out.record(&Told { ticket });
    Ok(())
}

pub(super) fn rm(ids: &[String], context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    for text in ids {
        if text.starts_with(JobId::PREFIX) {
            let record = store.job(&store.find_job(text)?)?;
            refuse_under_way(&record)?;
            if let Some(clip) = record.clip {
                store.remove_clip(&clip.id.into())?;
            }
            store.remove_job(&record.job)?;
            context.out.words(&format!("removed job {}", record.job.short()));
            continue;
        }
        let clip = store.find_clip(text)?;
        if let Some(record) = store.job_of_clip(&clip)? {
            refuse_under_way(&record)?;
            store.remove_job(&record.job)?;
        } else if store.clip_record(&clip)?.is_none() && !store.has_blob(&clip.into()) {
            return Err(StoreError::NotFound { what: "clip", given: text.clone(), list: "ls" }.into());
        }
        store.remove_clip(&clip)?;
        context.out.words(&format!("removed clip {}", clip.short()));
    }
    Ok(())
}

fn refuse_under_way(record: &JobRecord) -> Result<(), Failure> {
    if record.state.is_final() {
        return Ok(());
    }
    let job = record.job.short();
    let text =
        format!("job {job} is under way ({}); stop it first: kinoflock cancel {job}", record.state.name());
    Err(Failure::new(Exit::Usage, "job_under_way", text))
}

pub(super) fn verify(file: &Path, context: &Context<'_>) -> Result<(), Failure> {
    let bytes = read_file(file)?;
    match provenance::check(&bytes) {
        Ok(verified) => {
            context.out.words(&format!("{}: unchanged, signed by the node that made it", file.display()));
            let facts = of_file(&verified);
            tell(&facts, context);
            Ok(())
        }
        Err(ProvenanceError::None) => verify_bare(&bytes, context),
        Err(error) => Err(error.into()),
    }
}

/// A file without provenance may still be the bare clip of a job of one's own.
fn verify_bare(bytes: &[u8], context: &Context<'_>) -> Result<(), Failure> {
    // Without a store there is nothing to compare with.
    let known = context.store().ok().and_then(|store| store.job_of_clip(&ClipId::of(bytes)).ok().flatten());
    let Some((record, facts)) =
        known.and_then(|record| of_record(&record, context).map(|facts| (record, facts)))
    else {
        return Err(ProvenanceError::None.into());
    };
    context.out.words(&format!(
        "this file carries no receipt, but its bytes are the clip of your job {}, as its node signed them",
        record.job.short()
    ));
    tell(&facts, context);
    Ok(())
}

pub(super) fn show(what: &str, context: &Context<'_>) -> Result<(), Failure> {
    let path = Path::new(what);
    if path.is_file() {
        return verify(path, context);
    }
    let store = context.store()?;
    let clip = store.find_clip(what).map_err(|error| {
        let is_path = what.contains(['.', '/', '\\']);
        let failure = Failure::from(error);
        if is_path { failure.and("and there is no file of that name") } else { failure }
    })?;
    let record = store.job_of_clip(&clip)?;
    let Some(facts) = record.as_ref().and_then(|record| of_record(record, context)) else {
        let bytes = store.read_blob(&clip.into())?;
        let info = crate::verify::clip_info(&bytes)
            .map_err(|error| Failure::new(Exit::Verify, error.code(), error.to_string()))?;
        context.out.line(&format!("clip   {clip}"));
        context.out.line(&format!("size   {}x{}, {} frames", info.width, info.height, info.frames));
        context.out.words("it came by a ticket; who made it is not known");
        return Ok(());
    };
    tell(&facts, context);
    Ok(())
}

fn read_file(file: &Path) -> Result<Vec<u8>, Failure> {
    let fault = |error: std::io::Error| Failure::file("read", file, &error);
    let given = std::fs::metadata(file).map_err(fault)?.len();
    if given > MAX_CLIP_BYTES {
        let text =
            format!("{} has {given} bytes, clips of at most {MAX_CLIP_BYTES} are read", file.display());
        return Err(Failure::new(Exit::Verify, "clip_too_large", text));
    }
    std::fs::read(file).map_err(fault)
}

/// The adapters of a receipt, with what their cards say as far as these are here.
fn adapters(receipt: &Receipt, cards: &[Cited]) -> Vec<AdapterFacts> {
    let each = |used: &UsedAdapter| {
        let card = cards.iter().find(|cited| cited.card.subject == Subject::Adapter(used.weights));
        AdapterFacts::of(used.weights.to_string(), card).at(used.scale)
    };
    receipt.adapters.iter().map(each).collect()
}

fn of_receipt(receipt: &Receipt, network: String, model_name: &str, cards: &[Cited]) -> Facts {
    Facts {
        verified: true,
        network,
        clip: receipt.clip,
        job: receipt.job,
        node: receipt.node.to_string(),
        requester: receipt.requester.to_string(),
        model: receipt.model.to_string(),
        model_name: model_name.to_owned(),
        seed: receipt.seed.to_string(),
        steps: receipt.steps,
        made_at: receipt.finished_at.to_string(),
        device: receipt.device.name(),
        engine: receipt.engine.to_string(),
        adapters: adapters(receipt, cards),
        frames: None,
        width: None,
        height: None,
        fps: None,
        guidance: None,
        prompt: None,
        negative_prompt: None,
        prompt_is_signed: false,
        artist: None,
        licence: None,
        answer: None,
    }
}

fn of_file(verified: &Verified) -> Facts {
    let told = &verified.facts;
    let answer = verified.verdict.as_ref().map(|verdict| match verdict {
        Verdict::Accept => "accepted",
        Verdict::Dispute { .. } => "disputed",
    });
    let (receipt, network) = (verified.receipt.receipt(), network_name(&verified.network));
    let mut facts = of_receipt(receipt, network, &told.model_name, &verified.cards);
    facts.frames = Some(verified.info.frames);
    facts.width = Some(verified.info.width);
    facts.height = Some(verified.info.height);
    facts.fps = Some(told.fps.to_string());
    facts.guidance = Some(told.guidance.to_string());
    facts.prompt.clone_from(&told.prompt);
    facts.negative_prompt.clone_from(&told.negative_prompt);
    facts.artist.clone_from(&told.artist);
    facts.licence.clone_from(&told.licence);
    facts.answer = answer;
    if let Some(job) = &verified.job {
        add_spec(&mut facts, job);
    }
    facts
}

fn of_record(record: &JobRecord, context: &Context<'_>) -> Option<Facts> {
    let network = record.network;
    let valid = kinoflock_protocol::receipt::ValidReceipt::parse(record.receipt.as_ref()?, &network).ok()?;
    let cards: Vec<_> = generate::cards_of(record, context)
        .iter()
        .filter_map(|card| provenance::cited(card, &network).ok())
        .filter(|cited| valid.receipt().cards.contains(&cited.id))
        .collect();
    let mut facts = of_receipt(valid.receipt(), network_name(&network), &record.model_name, &cards);
    if let Ok(job) = ValidJob::parse_stored(&record.envelope, &network) {
        add_spec(&mut facts, job.spec());
    }
    facts.answer = (record.state == crate::store::RecordState::Done).then_some("accepted");
    Some(facts)
}

/// What the signed job says goes over what anybody else does.
fn add_spec(facts: &mut Facts, spec: &JobSpec) {
    let text = |prompt: &Prompt| Some(prompt.as_str().to_owned()).filter(|text| !text.is_empty());
    facts.frames = Some(spec.frames);
    facts.width = Some(spec.width);
    facts.height = Some(spec.height);
    facts.fps = Some(spec.fps.to_string());
    facts.guidance = Some(spec.guidance.to_string());
    facts.prompt = text(&spec.prompt);
    facts.negative_prompt = text(&spec.negative_prompt);
    facts.prompt_is_signed = true;
    facts.artist = spec.artist.as_ref().map(ToString::to_string);
    facts.licence = spec.licence.as_ref().map(ToString::to_string);
}

fn tell(facts: &Facts, context: &Context<'_>) {
    context.out.record(facts);
    let line = |name: &str, value: &str| context.out.line(&format!("{name:<10} {value}"));
    line("clip", &facts.clip.to_string());
    line("job", &facts.job.to_string());
    line("node", &facts.node);
    line("requester", &facts.requester);
    line("model", &format!("{} ({})", facts.model_name, facts.model));
    facts.adapters.iter().flat_map(AdapterFacts::lines).for_each(|text| context.out.line(&text));
    line("seed", &facts.seed);
    line("steps", &facts.steps.to_string());
    if let (Some(frames), Some(width), Some(height)) = (facts.frames, facts.width, facts.height) {
        let fps = facts.fps.as_deref().unwrap_or("?");
        line("size", &format!("{width}x{height}, {frames} frames at {fps} fps"));
    }
    let optional = [
        ("guidance", &facts.guidance),
        ("artist", &facts.artist),
        ("licence", &facts.licence),
        ("prompt", &facts.prompt),
        ("negative", &facts.negative_prompt),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            line(name, value);
        }
    }
    line("made", &format!("{} on {} by {}", facts.made_at, facts.device, facts.engine));
    line("network", &facts.network);
    if let Some(answer) = facts.answer {
        line("answer", &format!("the requester {answer} it"));
    }
    if !facts.prompt_is_signed {
        context.out.words(
            "signed by the node: everything but model name, guidance, fps, artist, licence and prompt, which are the exporter's word",
        );
    }
}
