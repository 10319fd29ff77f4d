//! Many jobs at once: `generate --variations`, and what `--batch` shares with it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use futures::stream::{self, StreamExt};
use kinoflock_protocol::{JobId, Millis, NodeId};
use serde::Serialize;
use tokio::sync::mpsc;

use super::args::{Generate, Save};
use super::context::Context;
use super::failure::{Exit, Failure};
use super::{audit, follow, generate};
use crate::ask::Ask;
use crate::output::many::{Label, Many as Progress};
use crate::route::called;
use crate::session::{Client, Delivered, EVENTS, Event, Events, Many, SessionError};
use crate::store::{BatchKey, JobRecord};
use crate::ticket::Way;

/// Seeds that are drawn are below this, so that a person can type one again.
pub(super) const READABLE_SEEDS: u64 = 1 << 32;

/// One of the jobs.
pub(super) struct Task {
    pub(super) label: Label,
    pub(super) ask: Ask,
    pub(super) save: Save,
    pub(super) key: Option<BatchKey>,
    /// Its job, if an earlier process handed it over.
    pub(super) before: Option<JobRecord>,
}

/// What became of a task.
pub(super) struct Outcome {
    pub(super) index: usize,
    pub(super) made: Result<Made, Failure>,
}

/// A clip that is here.
pub(super) struct Made {
    pub(super) job: JobId,
    pub(super) node: NodeId,
    pub(super) node_name: String,
    pub(super) seed: u64,
    pub(super) took: Millis,
    pub(super) file: Option<PathBuf>,
}

/// How they are run.
pub(super) struct Manner<'a> {
    pub(super) ways: &'a [Way],
    pub(super) in_flight: usize,
    pub(super) timeout: Option<u64>,
    /// What to say to who leaves.
    pub(super) left: &'static str,
}

#[derive(Serialize)]
struct Summary {
    event: &'static str,
    asked: usize,
    came: usize,
    nodes: usize,
    took_ms: u64,
}

pub(super) async fn variations(
    count: u32,
    ask: Ask,
    args: &Generate,
    context: &Context<'_>,
) -> Result<(), Failure> {
    let client = context.client().await?;
    let (ways, pinned) = context.ways(&client, &args.at)?;
    let ask = Ask { pinned, ..ask };
    let tasks = tasks(count, &ask, &args.save)?;
    if args.detach {
        return hand_over(&tasks, &ways, context, &client).await;
    }
    let manner = Manner {
        ways: &ways,
        in_flight: tasks.len(),
        timeout: args.timeout,
        left: "fetch each clip with: kinoflock wait JOB",
    };
    let started = Instant::now();
    let outcomes = run(&tasks, &manner, context, &client).await?;
    audit::after_many(&client, jobs_of(&outcomes), context).await;
    client.stop().await;
    summary(&tasks, &outcomes, started, context)
}

/// The jobs whose clips came.
pub(super) fn jobs_of(outcomes: &[Outcome]) -> Vec<JobId> {
    outcomes.iter().filter_map(|outcome| Some(outcome.made.as_ref().ok()?.job)).collect()
}

/// One line that says what came; what did not is told one by one.
pub(super) fn summary(
    tasks: &[Task],
    outcomes: &[Outcome],
    started: Instant,
    context: &Context<'_>,
) -> Result<(), Failure> {
    let made = outcomes.iter().filter_map(|outcome| outcome.made.as_ref().ok());
    let nodes: BTreeSet<NodeId> = made.clone().map(|made| made.node).collect();
    let (asked, came, took) = (tasks.len(), made.count(), Millis::from(started.elapsed()));
    let on = if nodes.len() == 1 { "1 node".to_owned() } else { format!("{} nodes", nodes.len()) };
    context.out.words(&format!("{came} of {asked} clips came, from {on}, in {took}"));
    context.out.record(&Summary { event: "summary", asked, came, nodes: nodes.len(), took_ms: took.0 });
    let failed: Vec<_> = outcomes.iter().filter_map(|o| Some((o.index, o.made.as_ref().err()?))).collect();
    let Some((_, first)) = failed.first() else { return Ok(()) };
    let mut text = format!("{} of {asked} clips did not come:", failed.len());
    for (index, failure) in &failed {
        text.push_str(&format!("\n  {}: {}", tasks[*index].label, failure.text));
    }
    Err(Failure::new(first.exit, first.code, text))
}

/// Runs them, so many at a time, and saves each clip when it comes; gives the outcomes in the order of the tasks.
pub(super) async fn run(
    tasks: &[Task],
    manner: &Manner<'_>,
    context: &Context<'_>,
    client: &Client,
) -> Result<Vec<Outcome>, Failure> {
    let many = client.many(manner.ways);
    let (sender, mut told) = mpsc::channel(EVENTS);
    let mut desk = Desk::new(tasks, context);
    let work = tasks.iter().enumerate().map(|(index, task)| one(index, task, &many, sender.clone()));
    let mut work = Box::pin(stream::iter(work).buffer_unordered(manner.in_flight));
    let mut deadline = std::pin::pin!(follow::sleep_or_never(manner.timeout));
    let (answers, mut answered) = mpsc::channel(1);
    let mut asked = false;
    // Listens all the time: a second one must not be missed while the first is dealt with.
    let mut interrupt = Box::pin(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            biased;
            Some((index, event)) = told.recv() => desk.show(index, &event),
            done = work.next() => match done {
                Some((index, delivered)) => {
                    while let Ok((index, event)) = told.try_recv() {
                        desk.show(index, &event);
                    }
                    desk.done(index, delivered, client);
                }
                None => return Ok(desk.outcomes()),
            },
            () = &mut deadline => {
                let text = format!("not done within {} s", manner.timeout.unwrap_or_default());
                return Err(desk.leave(Exit::Timeout, "timeout", text, manner));
            }
            _ = &mut interrupt => {
                interrupt = Box::pin(tokio::signal::ctrl_c());
                if asked || !context.out.can_ask() {
                    return Err(desk.leave(Exit::Interrupted, "detached", String::new(), manner));
                }
                asked = true;
                desk.progress.aside(|| context.out.words(
                    "\nc cancels the jobs, d detaches and lets them go on, w waits; then Enter (Ctrl-C again detaches)"));
                follow::read_answer(answers.clone());
            }
            Some(answer) = answered.recv() => match answer {
                'c' => {
                    drop(work);
                    return Err(desk.cancel(client).await);
                }
                'd' => return Err(desk.leave(Exit::Interrupted, "detached", String::new(), manner)),
                _ => asked = false,
            },
        }
    }
}

/// One of them to its end; its events go to all the others'.
async fn one(
    index: usize,
    task: &Task,
    many: &Many<'_>,
    sender: mpsc::Sender<(usize, Event)>,
) -> (usize, Result<Delivered, SessionError>) {
    let (events, mut told) = Client::events();
    let mut work = Box::pin(generate_or_go_on(task, many, events));
    loop {
        tokio::select! {
            biased;
            Some(event) = told.recv() => {
                // Who rendered them is gone: so is this work, at its next turn.
                let _ = sender.send((index, event)).await;
            }
            delivered = &mut work => {
                while let Ok(event) = told.try_recv() {
                    let _ = sender.send((index, event)).await;
                }
                return (index, delivered);
            }
        }
    }
}

async fn generate_or_go_on(task: &Task, many: &Many<'_>, events: Events) -> Result<Delivered, SessionError> {
    match &task.before {
        Some(record) => many.go_on(record, &events).await,
        None => many.generate(&task.ask, task.key.as_ref(), &events).await,
    }
}

/// What the artist sees of them, and what came.
struct Desk<'a> {
    tasks: &'a [Task],
    context: &'a Context<'a>,
    progress: Progress<'a>,
    /// Jobs under way.
    jobs: BTreeMap<usize, JobId>,
    outcomes: BTreeMap<usize, Outcome>,
}

impl<'a> Desk<'a> {
    fn new(tasks: &'a [Task], context: &'a Context<'a>) -> Self {
        let progress = context.out.many(tasks.iter().map(|task| task.label.clone()).collect());
        let before = tasks.iter().enumerate();
        let jobs = before.filter_map(|(index, task)| Some((index, task.before.as_ref()?.job))).collect();
        Self { tasks, context, progress, jobs, outcomes: BTreeMap::new() }
    }

    fn show(&mut self, index: usize, event: &Event) {
        if let Event::Accepted { job, .. } = event {
            self.jobs.insert(index, *job);
        }
        self.progress.show(index, event);
    }

    fn done(&mut self, index: usize, delivered: Result<Delivered, SessionError>, client: &Client) {
        self.jobs.remove(&index);
        self.progress.end(index);
        let task = &self.tasks[index];
        let made = delivered.map_err(Failure::from).and_then(|delivered| {
            let saved =
                self.progress.aside(|| generate::save(&delivered, client, &task.save, self.context))?;
            Ok(Made::of(&delivered, saved))
        });
        if let Err(failure) = &made {
            let text = format!("{}: {}", task.label, failure.text);
            self.progress.aside(|| self.context.out.words(&text));
        }
        self.outcomes.insert(index, Outcome { index, made });
    }

    fn outcomes(mut self) -> Vec<Outcome> {
        self.progress.clear();
        std::mem::take(&mut self.outcomes).into_values().collect()
    }

    /// They go on; their ids are the data that this process leaves behind.
    fn leave(&mut self, exit: Exit, code: &'static str, text: String, manner: &Manner<'_>) -> Failure {
        self.progress.clear();
        let out = self.context.out;
        out.words(&format!("{} jobs go on; {}", self.jobs.len(), manner.left));
        for job in self.jobs.values() {
            out.line(&job.to_string());
            out.record(&follow::Left { event: "detached", job: *job });
        }
        Failure::new(exit, code, text)
    }

    async fn cancel(&mut self, client: &Client) -> Failure {
        self.progress.clear();
        let cancelled = self.jobs.values().map(|job| async move { (*job, client.cancel(job).await) });
        let (mut stopped, mut text) = (0, String::new());
        for (job, result) in futures::future::join_all(cancelled).await {
            match result {
                Ok(_) => {
                    stopped += 1;
                    self.context.out.record(&follow::Left { event: "cancelled", job });
                }
                Err(error) => {
                    let job = job.short();
                    text.push_str(&format!(
                        "\n  job {job} goes on ({error}); try again with: kinoflock cancel {job}"
                    ));
                }
            }
        }
        let code = if text.is_empty() { "cancelled" } else { "not_cancelled" };
        let text =
            format!("{stopped} jobs cancelled; if another was on its way, kinoflock ps shows it{text}");
        Failure::new(Exit::Interrupted, code, text)
    }
}

impl Made {
    fn of(delivered: &Delivered, file: Option<PathBuf>) -> Self {
        let (record, receipt) = (&delivered.record, delivered.receipt.receipt());
        Self {
            job: record.job,
            node: record.node,
            node_name: record.node_name.clone(),
            seed: receipt.seed,
            took: receipt.finished_at.since(receipt.accepted_at),
            file,
        }
    }

    /// The node, as people call it.
    pub(super) fn by(&self) -> String {
        called(&self.node_name, &self.node)
    }
}

/// Hands all over and leaves.
async fn hand_over(
    tasks: &[Task],
    ways: &[Way],
    context: &Context<'_>,
    client: &Client,
) -> Result<(), Failure> {
    let many = client.many(ways);
    for task in tasks {
        let (events, told) = Client::events();
        let mut progress = context.out.progress();
        let record = follow::show_while(many.submit(&task.ask, None, &events), told, &mut progress).await?;
        drop(progress);
        context.out.line(&record.job.to_string());
        context.out.record(&follow::Left { event: "detached", job: record.job });
    }
    client.stop().await;
    context.out.words("handed over; fetch each clip with: kinoflock wait JOB");
    Ok(())
}

fn tasks(count: u32, ask: &Ask, save: &Save) -> Result<Vec<Task>, Failure> {
    if save.output.as_deref() == Some(Path::new("-")) {
        return Err(Failure::usage("-o - is one place for several clips; give a file name such as clip.mp4"));
    }
    let first = match ask.seed {
        Some(seed) => seed,
        None => crate::session::random()? % READABLE_SEEDS,
    };
    let task = |number: u32| {
        let seed = first.wrapping_add(u64::from(number));
        let output = Some(with_seed(save.output.as_deref(), seed));
        Task {
            label: Label::Seed(seed.to_string()),
            ask: Ask { seed: Some(seed), ..ask.clone() },
            save: Save { output, ..save.clone() },
            key: None,
            before: None,
        }
    };
    Ok((0..count).map(task).collect())
}

/// `clip.mp4` and 7 give `clip-7.mp4`.
fn with_seed(output: Option<&Path>, seed: u64) -> PathBuf {
    let path = output.unwrap_or(Path::new("kinoflock.mp4"));
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{seed}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_seed_has_a_file_of_its_own() {
        let named = |output: Option<&str>| with_seed(output.map(Path::new), 7).display().to_string();
        assert_eq!(named(Some("clip.mp4")), "clip-7.mp4");
        assert_eq!(named(Some("out/a.b.mp4")), "out/a.b-7.mp4");
        assert_eq!(named(Some("clip")), "clip-7");
        assert_eq!(named(None), "kinoflock-7.mp4");
    }

    #[test]
    fn seeds_follow_the_given_one_and_wrap() {
        let ask = Ask { seed: Some(u64::MAX), ..Ask::default() };
        let tasks = tasks(3, &ask, &Save::default()).unwrap_or_default();
        let seeds: Vec<_> = tasks.iter().map(|task| task.ask.seed).collect();
        assert_eq!(seeds, [Some(u64::MAX), Some(0), Some(1)]);
        let to_stdout = Save { output: Some("-".into()), ..Save::default() };
        assert!(super::tasks(3, &ask, &to_stdout).is_err());
    }
}
