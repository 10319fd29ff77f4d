//! `ps`, `status`, `wait`, `cancel`.

use std::time::Duration;

use kinoflock_protocol::{JobId, UnixMillis};
use serde::Serialize;

use super::args::{Save, Where};
use super::context::Context;
use super::failure::{Exit, Failure};
use super::{audit, follow, generate};
use crate::session::SessionError;
use crate::store::{JobEntry, JobRecord, RecordState};

/// Time in which a node must tell how a job stands, before what is known here is shown.
const ASK_WITHIN: Duration = Duration::from_secs(15);

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    job: &'a JobEntry,
}

#[derive(Serialize)]
struct Status<'a> {
    job: JobId,
    state: &'static str,
    node: String,
    node_name: &'a str,
    model: &'a str,
    created_at: UnixMillis,
    clip: Option<String>,
    error: Option<&'a str>,
    position: Option<u32>,
    eta_ms: Option<u64>,
    asked: bool,
}

pub(super) fn ps(all: bool, context: &Context<'_>) -> Result<(), Failure> {
    let jobs = context.store()?.jobs()?;
    let shown: Vec<_> = jobs.iter().filter(|job| all || !job.state.is_final()).collect();
    if shown.is_empty() {
        context.out.words(if all {
            "no jobs"
        } else {
            "no jobs under way; finished ones: kinoflock ps --all"
        });
    }
    for job in shown {
        context.out.record(&Row { job });
        let clip = job.clip.map_or_else(|| "-".to_owned(), |clip| clip.short());
        let (id, when, state) = (job.job.short(), short_time(job.created_at), job.state.name());
        let node =
            if job.node_name.is_empty() { format!("...{}", job.node.short()) } else { job.node_name.clone() };
        context.out.line(&format!("{id}  {when}  {state:<9}  {:<16}  {node:<16}  {clip}", job.model_name));
    }
    Ok(())
}

pub(super) async fn status(job: &str, context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let record = store.job(&store.find_job(job)?)?;
    if record.state.is_final() || record.state == RecordState::Made {
        show(&record, None, context);
        return Ok(());
    }
    let client = context.quiet_client().await?;
    match tokio::time::timeout(ASK_WITHIN, client.status(&record.job)).await {
        Ok(Ok((record, status))) => show(&record, Some((status.position, status.eta.0)), context),
        Ok(Err(error @ SessionError::Lost { .. })) => return Err(error.into()),
        failed => {
            let why = match failed {
                Ok(Err(error)) => error.to_string(),
                _ => format!("no answer within {} s", ASK_WITHIN.as_secs()),
            };
            context.out.words(&format!("its node could not be asked ({why}); this is how it stood last:"));
            show(&record, None, context);
        }
    }
    client.stop().await;
    Ok(())
}

pub(super) async fn wait(
    job: &str,
    timeout: Option<u64>,
    save: &Save,
    context: &Context<'_>,
) -> Result<(), Failure> {
    generate::check_place(save, context)?;
    let job = context.store()?.find_job(job)?;
    let client = context.client().await?;
    let (ways, _) = context.ways(&client, &Where::default())?;
    let delivered = follow::job(context, &client, job, &ways, timeout).await?;
    let saved = generate::save(&delivered, &client, save, context).map(drop);
    audit::after(&client, &job, context).await;
    client.stop().await;
    saved
}

pub(super) async fn cancel(job: &str, context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let record = store.job(&store.find_job(job)?)?;
    if record.state.is_final() {
        let text = format!("job {} is over already: {}", record.job.short(), record.state.name());
        return Err(Failure::new(Exit::Usage, "job_over", text));
    }
    let client = context.client().await?;
    let record = client.cancel(&record.job).await?;
    client.stop().await;
    context.out.words("cancelled");
    show(&record, None, context);
    Ok(())
}

fn show(record: &JobRecord, told: Option<(u32, u64)>, context: &Context<'_>) {
    let status = Status {
        job: record.job,
        state: record.state.name(),
        node: record.node.to_string(),
        node_name: &record.node_name,
        model: &record.model_name,
        created_at: record.created_at,
        clip: record.clip.map(|clip| kinoflock_protocol::ClipId::from(clip.id).to_string()),
        error: record.error.as_ref().map(|error| error.text.as_str()),
        position: told.map(|(position, _)| position),
        eta_ms: told.map(|(_, eta)| eta),
        asked: told.is_some(),
    };
    context.out.record(&status);
    let out = context.out;
    out.line(&format!("job    {}", status.job));
    out.line(&format!("state  {}", status.state));
    let name = if status.node_name.is_empty() { String::new() } else { format!(" ({})", status.node_name) };
    out.line(&format!("node   {}{name}", status.node));
    out.line(&format!("model  {}", status.model));
    out.line(&format!("from   {}", status.created_at));
    if let (Some((position, eta)), false) = (told, record.state.is_final()) {
        out.line(&format!("queue  {position} ahead, about {}", kinoflock_protocol::Millis(eta)));
    }
    if let Some(clip) = &status.clip {
        out.line(&format!("clip   {clip}"));
    }
    if let Some(error) = status.error {
        out.line(&format!("error  {error}"));
    }
    for verdict in audit::lines_of(record) {
        out.line(&format!("audit  {verdict}"));
    }
}

/// `2026-11-22 21:40`
pub(super) fn short_time(time: UnixMillis) -> String {
    time.to_string().chars().take(16).map(|c| if c == 'T' { ' ' } else { c }).collect()
}
