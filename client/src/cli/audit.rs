//! `kinoflock audit`: another node looks at one step of a finished job; and the audits that are drawn at random.

use std::time::Duration;

use futures::stream::{self, StreamExt};
use kinoflock_protocol::audit::{AuditDifference, AuditOutcome, AuditVerdict};
use kinoflock_protocol::{Envelope, JobId, NodeId};
use serde::Serialize;

use super::args::Where;
use super::context::Context;
use super::failure::{Exit, Failure};
use crate::route::called;
use crate::session::{Audited, Client, Events, SessionError};
use crate::store::{JobRecord, StoreError};

/// Longest wait for an audit that was asked for.
const WITHIN: Duration = Duration::from_secs(900);
/// Longest wait for audits that were drawn at random, when the clips are here.
const DRAWN_WITHIN: Duration = Duration::from_secs(60);
/// Audits of a batch at once.
const AT_ONCE: usize = 4;

/// A verdict, for programs.
#[derive(Serialize)]
struct Record<'a> {
    event: &'static str,
    job: JobId,
    maker: NodeId,
    auditor: NodeId,
    step: u32,
    outcome: &'static str,
    differs: Option<&'static str>,
    why: Option<&'a str>,
    deviation: String,
    tolerance: String,
    precision: &'static str,
}

impl<'a> Record<'a> {
    fn of(verdict: &'a AuditVerdict) -> Self {
        let (differs, why) = match &verdict.outcome {
            AuditOutcome::Honest => (None, None),
            AuditOutcome::Differs(difference) => (Some(difference.name()), None),
            AuditOutcome::CouldNotLook { obstacle, why } => (Some(obstacle.name()), Some(why.as_str())),
        };
        Self {
            event: "audited",
            job: verdict.job,
            maker: verdict.maker,
            auditor: verdict.auditor,
            step: verdict.step,
            outcome: verdict.outcome.name(),
            differs: differs.filter(|_| why.is_none()),
            why,
            deviation: verdict.deviation.to_string(),
            tolerance: verdict.tolerance.to_string(),
            precision: verdict.precision.name(),
        }
    }
}

pub(super) async fn run(text: &str, by: Option<String>, context: &Context<'_>) -> Result<(), Failure> {
    let store = context.store()?;
    let job = if text.starts_with(JobId::PREFIX) {
        store.find_job(text)?
    } else {
        let none = StoreError::NotFound { what: "job of clip", given: text.to_owned(), list: "ls" };
        store.job_of_clip(&store.find_clip(text)?)?.ok_or(none)?.job
    };
    let record = store.job(&job)?;
    let client = context.client().await?;
    let (ways, named) = context.ways(&client, &Where { node: by })?;
    let auditors = client.find_auditors(&job, &ways, named, &Events::none()).await?;
    if auditors.is_empty() {
        return Err(SessionError::NotAudited { job, reasons: Vec::new() }.into());
    }
    let names: Vec<String> = auditors.iter().map(|node| called(&node.name, &node.node)).collect();
    context.out.words(&format!(
        "asking {} to look at a step of job {}; it will see the prompt, the clip and four states of the latents",
        names.join(", or else "),
        record.job.short()
    ));
    let audited = tokio::select! {
        audited = client.audit(&job, &auditors, WITHIN) => audited?,
        _ = tokio::signal::ctrl_c() => return Err(Failure::new(Exit::Interrupted, "interrupted", "stopped")),
    };
    client.stop().await;
    context.out.record(&Record::of(&audited.verdict));
    for line in words(&audited) {
        context.out.line(&line);
    }
    match &audited.verdict.outcome {
        AuditOutcome::Honest => Ok(()),
        AuditOutcome::Differs(_) => {
            let text = format!("{} did not compute what it signed", audited.maker);
            Err(Failure::new(Exit::Verify, "audit_differs", text))
        }
        AuditOutcome::CouldNotLook { why, .. } => {
            Err(Failure::new(Exit::Other, "audit_could_not_look", format!("nothing was seen: {why}")))
        }
    }
}

/// Has a clip audited that was just saved, if it is drawn; told in one line.
pub(super) async fn after(client: &Client, job: &JobId, context: &Context<'_>) {
    let audited = tokio::select! {
        audited = client.audit_if_drawn(job, DRAWN_WITHIN) => audited,
        // The clip is here: who does not want to wait for the audit need not.
        _ = tokio::signal::ctrl_c() => return,
    };
    tell(audited, context);
}

/// The same for many clips.
pub(super) async fn after_many(client: &Client, jobs: Vec<JobId>, context: &Context<'_>) {
    let all = jobs.iter().map(|job| client.audit_if_drawn(job, DRAWN_WITHIN));
    let mut all = stream::iter(all).buffer_unordered(AT_ONCE);
    let telling = async {
        while let Some(audited) = all.next().await {
            tell(audited, context);
        }
    };
    tokio::select! {
        // Those that are not looked at by then are not looked at.
        _ = tokio::time::timeout(DRAWN_WITHIN, telling) => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

fn tell(audited: Result<Option<Audited>, SessionError>, context: &Context<'_>) {
    match audited {
        Ok(None) => {}
        Ok(Some(audited)) => {
            context.out.record(&Record::of(&audited.verdict));
            context.out.words(&line(&audited));
        }
        Err(error) => context.out.words(&format!("drawn for an audit that did not come about: {error}")),
    }
}

/// A line for each verdict on a job, as it is kept.
pub(super) fn lines_of(record: &JobRecord) -> Vec<String> {
    let opened = |envelope: &Envelope| {
        let verdict = envelope.open::<AuditVerdict>(&record.network).ok()?.value;
        let named = record.audits.auditors.iter().find(|auditor| auditor.node == verdict.auditor);
        let auditor = called(named.map_or("", |auditor| auditor.name.as_str()), &verdict.auditor);
        let name = if verdict.maker == record.node { record.node_name.as_str() } else { "" };
        let maker = called(name, &verdict.maker);
        Some(line(&Audited { verdict, auditor, maker }))
    };
    record.audits.verdicts.iter().filter_map(opened).collect()
}

/// One line on what was found.
fn line(audited: &Audited) -> String {
    let Audited { verdict, auditor, maker } = audited;
    match &verdict.outcome {
        AuditOutcome::Honest => format!("audited by {auditor}: {maker} computed what it signed"),
        AuditOutcome::Differs(difference) => format!(
            "audited by {auditor}: {maker} did not compute what it signed ({}); other nodes come first from now on",
            difference.sentence()
        ),
        AuditOutcome::CouldNotLook { why, .. } => format!("{auditor} could not audit {maker}: {why}"),
    }
}

fn words(audited: &Audited) -> Vec<String> {
    let AuditVerdict { step, deviation, tolerance, precision, outcome, .. } = &audited.verdict;
    let mut lines = vec![line(audited)];
    let measured = format!("{deviation} off, {tolerance} allowed in {} precision", precision.name());
    match outcome {
        AuditOutcome::Honest => lines.push(format!(
            "step {} was computed anew: {measured}; beginning and frames fit too. An audit sees one step: it catches a single \
             wrong one once in as many audits as there are steps",
            step + 1
        )),
        AuditOutcome::Differs(AuditDifference::Step | AuditDifference::Frames) => {
            lines.push(format!("step {}: {measured}", step + 1));
        }
        AuditOutcome::Differs(_) | AuditOutcome::CouldNotLook { .. } => {}
    }
    lines
}
