//! The operator's veto: a command of theirs that may refuse a job.
//!
//! It gets one JSON object on stdin and nothing else of the job; exit code 0 allows. Otherwise the first line of its
//! output is the reason that the artist is told. A hook that fails, hangs or cannot be started refuses too, and says
//! so: an operator who set a rule does not want it skipped.

use std::process::Stdio;

use kinoflock_protocol::id::{JobId, RequesterId};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::{Class, Refusal, Rule, Wanted};
use crate::config::HookConfig;

/// Most bytes read of a hook's output.
const MAX_OUTPUT: u64 = 4 * 1024;

/// Most characters of a hook's reason that reach the artist.
const MAX_REASON: usize = 200;

/// What a hook is told.
#[derive(Debug, Serialize)]
struct Facts<'a> {
    schema: u32,
    job: JobId,
    requester: RequesterId,
    class: &'a str,
    model: kinoflock_protocol::id::ModelId,
    width: u32,
    height: u32,
    frames: u32,
    steps: u32,
    work_units: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    second_prompt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    negative_prompt: Option<&'a str>,
}

/// A job as the hook sees it. The prompts are given to the hook only if the operator configured that.
#[derive(Debug, Clone, Copy)]
pub struct HookJob<'a> {
    /// The job.
    pub job: JobId,
    /// The artist's key.
    pub requester: RequesterId,
    /// In whose favour.
    pub class: Class,
    /// The clip.
    pub wanted: Wanted,
    /// Its prompt.
    pub prompt: &'a str,
    /// A second prompt that is mixed into it.
    pub second_prompt: Option<&'a str>,
    /// Its negative prompt.
    pub negative_prompt: &'a str,
}

/// Asks the hook.
///
/// # Errors
/// A refusal by [`Rule::Hook`] with the hook's reason, or with what went wrong with the hook.
pub async fn run(hook: &HookConfig, job: &HookJob<'_>) -> Result<(), Refusal> {
    let refused = |reason: &str| Rule::Hook.refuse("what the operator's own command allows", reason);
    match tokio::time::timeout(hook.timeout, ask(hook, job)).await {
        Ok(Ok(None)) => Ok(()),
        Ok(Ok(Some(reason))) => Err(refused(&reason)),
        Ok(Err(error)) => {
            tracing::warn!(hook = %hook.program.display(), %error, "veto hook failed");
            Err(refused("the hook could not be run"))
        }
        Err(_) => {
            tracing::warn!(hook = %hook.program.display(), timeout_ms = hook.timeout.as_millis(), "veto hook too slow");
            Err(refused("the hook did not answer in time"))
        }
    }
}

async fn ask(hook: &HookConfig, job: &HookJob<'_>) -> std::io::Result<Option<String>> {
    let mut child = Command::new(&hook.program)
        .args(&hook.args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = child.stdin.take().expect("invariant: stdin is piped");
    let stdout = child.stdout.take().expect("invariant: stdout is piped");
    let facts = facts(hook, job);
    let tell = async move {
        // A hook that decides without reading closes its end; that is no failure.
        match stdin.write_all(&facts).await {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    };
    let mut output = Vec::new();
    let listen = async {
        let mut limited = stdout.take(MAX_OUTPUT);
        limited.read_to_end(&mut output).await?;
        // The rest is read and dropped, so that a talkative hook does not hang on a full pipe.
        tokio::io::copy(&mut limited.into_inner(), &mut tokio::io::sink()).await
    };
    tokio::try_join!(tell, listen)?;
    if child.wait().await?.success() {
        return Ok(None);
    }
    Ok(Some(reason(&output)))
}

fn facts(hook: &HookConfig, job: &HookJob<'_>) -> Vec<u8> {
    let facts = Facts {
        schema: 1,
        job: job.job,
        requester: job.requester,
        class: job.class.name(),
        model: job.wanted.model,
        width: job.wanted.shape.width,
        height: job.wanted.shape.height,
        frames: job.wanted.shape.frames,
        steps: job.wanted.shape.steps,
        work_units: job.wanted.work.0.to_string(),
        prompt: hook.sees_prompt.then_some(job.prompt),
        second_prompt: job.second_prompt.filter(|_| hook.sees_prompt),
        negative_prompt: hook.sees_prompt.then_some(job.negative_prompt),
    };
    serde_json::to_vec(&facts).expect("invariant: the facts serialise")
}

fn reason(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no reason given");
    line.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect()
}
