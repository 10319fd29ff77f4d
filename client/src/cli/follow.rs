//! Following work on the terminal: events are shown as they come, and Ctrl-C asks what to do.

use std::future::Future;
use std::time::Duration;

use kinoflock_protocol::JobId;
use serde::Serialize;
use tokio::sync::mpsc;

use super::context::Context;
use super::failure::{Exit, Failure};
use crate::output::Progress;
use crate::session::{Client, Delivered, Event, SessionError};
use crate::ticket::Way;

#[derive(Serialize)]
pub(super) struct Left {
    pub(super) event: &'static str,
    pub(super) job: JobId,
}

/// Shows events while `work` runs; Ctrl-C ends it with exit code 130.
pub(super) async fn show_while<T>(
    work: impl Future<Output = Result<T, SessionError>>,
    mut told: mpsc::Receiver<Event>,
    progress: &mut Progress<'_>,
) -> Result<T, Failure> {
    let mut work = std::pin::pin!(work);
    let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            biased;
            Some(event) = told.recv() => progress.show(&event),
            done = &mut work => {
                while let Ok(event) = told.try_recv() {
                    progress.show(&event);
                }
                return Ok(done?);
            }
            _ = &mut interrupt => {
                let text = "stopped; if a job was already on its way, kinoflock ps shows it";
                return Err(Failure::new(Exit::Interrupted, "interrupted", text));
            }
        }
    }
}

/// Follows a job to its clip. Ctrl-C offers to cancel it or to leave it.
pub(super) async fn job(
    context: &Context<'_>,
    client: &Client,
    job: JobId,
    ways: &[Way],
    timeout: Option<u64>,
) -> Result<Delivered, Failure> {
    let (events, mut told) = Client::events();
    let mut progress = context.out.progress();
    let mut work = std::pin::pin!(client.follow(&job, ways, &events));
    let mut deadline = std::pin::pin!(sleep_or_never(timeout));
    let (answers, mut answered) = mpsc::channel(1);
    let mut asked = false;
    // Listens all the time: a second one must not be missed while the first is dealt with.
    let mut interrupt = Box::pin(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            biased;
            Some(event) = told.recv() => progress.show(&event),
            done = &mut work => {
                while let Ok(event) = told.try_recv() {
                    progress.show(&event);
                }
                return Ok(done?);
            }
            () = &mut deadline => {
                progress.clear();
                let text = format!(
                    "not done within {} s; the job goes on, fetch it with: kinoflock wait {}",
                    timeout.unwrap_or_default(),
                    job.short()
                );
                return Err(Failure::new(Exit::Timeout, "timeout", text));
            }
            _ = &mut interrupt => {
                interrupt = Box::pin(tokio::signal::ctrl_c());
                if asked || !context.out.can_ask() {
                    return Err(leave(context, &progress, job));
                }
                asked = true;
                // On a line of its own: the moving line goes on below it.
                progress.aside(|| context.out.words(
                    "\nc cancels the job, d detaches and lets it go on, w waits; then Enter (Ctrl-C again detaches)"));
                read_answer(answers.clone());
            }
            Some(answer) = answered.recv() => match answer {
                'c' => return Err(cancel(context, client, &progress, job).await),
                'd' => return Err(leave(context, &progress, job)),
                _ => asked = false,
            },
        }
    }
}

pub(super) async fn sleep_or_never(seconds: Option<u64>) {
    match seconds {
        Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
        None => std::future::pending().await,
    }
}

/// Reads one line from the terminal on a thread of its own; nobody waits for that thread at the end.
pub(super) fn read_answer(answers: mpsc::Sender<char>) {
    std::thread::spawn(move || {
        let mut line = String::new();
        // An input that ended is an answer too: wait.
        let _ = std::io::stdin().read_line(&mut line);
        let answer = line.trim().chars().next().unwrap_or('w').to_ascii_lowercase();
        let _ = answers.blocking_send(answer);
    });
}

/// The job goes on; its id is the data that this process leaves behind.
fn leave(context: &Context<'_>, progress: &Progress<'_>, job: JobId) -> Failure {
    progress.clear();
    context.out.words(&format!("left; the job goes on. Fetch its clip with: kinoflock wait {}", job.short()));
    context.out.line(&job.to_string());
    context.out.record(&Left { event: "detached", job });
    Failure::new(Exit::Interrupted, "detached", "")
}

async fn cancel(context: &Context<'_>, client: &Client, progress: &Progress<'_>, job: JobId) -> Failure {
    progress.clear();
    match client.cancel(&job).await {
        Ok(_) => {
            context.out.record(&Left { event: "cancelled", job });
            Failure::new(Exit::Interrupted, "cancelled", format!("job {} cancelled", job.short()))
        }
        Err(error) => {
            let text = format!(
                "the job could not be cancelled and goes on ({error}); try again with: kinoflock cancel {}",
                job.short()
            );
            Failure::new(Exit::Interrupted, "not_cancelled", text)
        }
    }
}
