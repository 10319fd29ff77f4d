//! Which models are wanted, and when: sans-IO. One is fetched at a time; one that could not be had is due again later,
//! each time after twice as long.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kinoflock_net::FetchProgress;
use kinoflock_protocol::id::ModelId;
use tokio::sync::watch;

use crate::admin::report::ArchiveReport;

/// Most models that are wanted at once.
pub(super) const MAX_WANTS: usize = 64;
/// First wait after a failure; it doubles.
const AGAIN: Duration = Duration::from_secs(2);
/// Longest wait.
const AGAIN_MOST: Duration = Duration::from_secs(300);

/// How far a model has come.
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<Counted>);

#[derive(Debug, Default)]
struct Counted {
    total: u64,
    done: u64,
    file: Option<watch::Receiver<FetchProgress>>,
}

impl Progress {
    /// A model of so many bytes begins.
    pub(super) fn begin(&self, total: u64) {
        *self.lock() = Counted { total, ..Counted::default() };
    }

    /// A file begins, of which this tells more.
    pub(super) fn file(&self, file: watch::Receiver<FetchProgress>) {
        self.lock().file = Some(file);
    }

    /// A file of so many bytes is whole.
    pub(super) fn whole(&self, len: u64) {
        let mut counted = self.lock();
        counted.done += len;
        counted.file = None;
    }

    fn told(&self) -> (u64, u64) {
        let counted = self.lock();
        let file = counted.file.as_ref().map_or(0, |file| file.borrow().done);
        (counted.done + file, counted.total)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A model that is wanted.
#[derive(Debug)]
struct Want {
    name: String,
    state: State,
    tries: u32,
    progress: Arc<Progress>,
}

#[derive(Debug)]
enum State {
    /// To be fetched then; why it could not be before.
    Due(Instant, String),
    Coming,
    Held(ModelId),
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Wants(Vec<Want>);

impl Wants {
    /// Wants a model, by name or id; one that failed is due at once.
    pub(super) fn add(&mut self, name: &str, now: Instant) {
        let (state, is_full) = (State::Due(now, String::new()), self.is_full());
        match self.0.iter_mut().find(|want| want.name == name) {
            Some(want) if matches!(want.state, State::Due(..)) => (want.state, want.tries) = (state, 0),
            Some(_) => {}
            None if is_full => {}
            None => self.0.push(Want { name: name.to_owned(), state, tries: 0, progress: Arc::default() }),
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.0.len() >= MAX_WANTS
    }

    /// The next one that is due, now coming.
    pub(super) fn next(&mut self, now: Instant) -> Option<(String, Arc<Progress>)> {
        if self.0.iter().any(|want| matches!(want.state, State::Coming)) {
            return None;
        }
        let due = |want: &&mut Want| matches!(want.state, State::Due(at, _) if at <= now);
        let want = self.0.iter_mut().find(due)?;
        want.state = State::Coming;
        Some((want.name.clone(), Arc::clone(&want.progress)))
    }

    /// When the next one is due.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let due = |want: &Want| match want.state {
            State::Due(at, _) => Some(at),
            _ => None,
        };
        let coming = self.0.iter().any(|want| matches!(want.state, State::Coming));
        if coming { None } else { self.0.iter().filter_map(due).min() }
    }

    /// One came, or could not be had.
    pub(super) fn done(&mut self, name: &str, result: Result<ModelId, String>, now: Instant) {
        let Some(want) = self.0.iter_mut().find(|want| want.name == name) else { return };
        want.state = match result {
            Ok(id) => State::Held(id),
            Err(reason) => {
                let wait = AGAIN.saturating_mul(1 << want.tries.min(16)).min(AGAIN_MOST);
                want.tries += 1;
                State::Due(now + wait, reason)
            }
        };
    }

    pub(super) fn report(&self) -> Vec<ArchiveReport> {
        let one = |want: &Want| {
            let (done, total) = want.progress.told();
            let (state, model, text) = match &want.state {
                State::Due(_, reason) => ("waits", None, reason.clone()),
                State::Coming => ("comes", None, String::new()),
                State::Held(id) => ("held", Some(id.to_string()), String::new()),
            };
            ArchiveReport { name: want.name.clone(), state: state.to_owned(), model, done, total, text }
        };
        self.0.iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_comes_at_a_time_and_a_failed_one_is_due_later_each_time() {
        let (mut wants, start) = (Wants::default(), Instant::now());
        wants.add("a", start);
        wants.add("b", start);
        wants.add("a", start);
        assert_eq!(wants.poll_timeout(), Some(start));
        assert_eq!(wants.next(start).expect("due").0, "a");
        assert!(wants.next(start).is_none() && wants.poll_timeout().is_none(), "one at a time");
        wants.done("a", Err("nobody has it".to_owned()), start);
        assert_eq!(wants.next(start).expect("due").0, "b");
        wants.done("b", Ok(ModelId::of(b"b")), start);
        let mut now = start;
        for seconds in [2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            let due = wants.poll_timeout().expect("due");
            assert_eq!(due - now, Duration::from_secs(seconds));
            now = due;
            assert!(wants.next(now - Duration::from_millis(1)).is_none());
            wants.next(now).expect("due");
            wants.done("a", Err("nobody has it".to_owned()), now);
        }
        let told = wants.report();
        assert_eq!((told[0].state.as_str(), told[0].text.as_str()), ("waits", "nobody has it"));
        assert_eq!((told[1].state.as_str(), told[1].model.is_some()), ("held", true));
        wants.add("a", now);
        assert_eq!(wants.next(now).expect("asked for again: due at once").0, "a");
    }
}
