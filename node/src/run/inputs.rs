//! The inputs of a job: pulled from whoever submitted it, each MiB checked before it is written.

use kinoflock_net::{FetchOptions, FileSink};
use kinoflock_protocol::id::JobId;

use super::{Daemon, Note};
use crate::scheduler::Cause;

/// Bytes of inputs that a job may bring.
pub(super) const MAX_INPUT_BYTES: u64 = 256 << 20;
/// Name of the initial latents in a job's folder.
pub(super) const LATENTS: &str = "initial-latents.safetensors";

impl Daemon {
    /// Fetches what is missing; the job keeps its place meanwhile, for as long as the scheduler grants.
    pub(super) fn fetch_inputs(&mut self, job: &JobId) {
        let Some(live) = self.live.get(job) else { return };
        let (Some(submitter), Some(latents)) = (live.submitter, live.job.spec().initial_latents) else {
            return;
        };
        let missing = kinoflock_protocol::List::first_of([latents.id]);
        self.boards.tell(job, kinoflock_protocol::progress::JobEvent::AwaitingInputs { missing });
        let (net, folder, job) = (self.net.clone(), self.work_folder(job), *job);
        self.spawn(async move {
            let fetched = async {
                std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
                let sink = FileSink::new(folder.join(LATENTS));
                let options =
                    FetchOptions { max_len: latents.len.min(MAX_INPUT_BYTES), ..FetchOptions::default() };
                net.fetch_blob(latents.id, &[submitter], sink, options)
                    .await
                    .map_err(|error| error.to_string())
            };
            Note::Inputs { job, result: fetched.await.map(|_| ()) }
        });
    }

    pub(super) fn handle_inputs(&mut self, job: JobId, result: Result<(), String>) {
        let now = std::time::Instant::now();
        match result {
            Ok(()) => {
                self.scheduler.handle_inputs(&job, now);
                let queue = self.queue.clone();
                tokio::spawn(async move {
                    if let Err(error) = queue.inputs_ready(job).await {
                        tracing::error!(job = %job.short(), %error, "after a restart the job's inputs will be missed");
                    }
                });
            }
            Err(text) => {
                tracing::warn!(job = %job.short(), "inputs could not be had");
                let cause = Cause { code: "inputs".to_owned(), text, retryable: true };
                self.scheduler.handle_inputs_failed(&job, cause, now);
            }
        }
    }
}
