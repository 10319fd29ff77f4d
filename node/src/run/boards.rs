//! What is told of each job: a numbered log that followers read from any number on, and wait at its end.
//!
//! A board is cheap: a bounded log behind a lock and a version that followers watch. A slow follower holds up nobody; it
//! finds later what it missed, previews excepted, of which a board keeps the newest alone.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use kinoflock_net::progress::ProgressSender;
use kinoflock_protocol::id::JobId;
use kinoflock_protocol::progress::{JobEvent, Progress};
use tokio::sync::watch;

/// Most events that a board keeps. Older ones are gone for who comes later; the newest state never is.
const MAX_EVENTS: usize = 512;

/// The boards of all jobs that run, wait, or ended not long ago.
#[derive(Debug, Default)]
pub(super) struct Boards {
    boards: BTreeMap<JobId, Arc<Board>>,
}

/// The log of one job.
#[derive(Debug)]
pub(super) struct Board {
    job: JobId,
    log: Mutex<Log>,
    version: watch::Sender<u64>,
}

#[derive(Debug)]
struct Log {
    events: VecDeque<Progress>,
    next: u64,
    ended: Option<Instant>,
}

impl Boards {
    /// The board of a job; a new one counts from `first`.
    pub(super) fn board(&mut self, job: JobId, first: u64) -> Arc<Board> {
        Arc::clone(self.boards.entry(job).or_insert_with(|| Arc::new(Board::new(job, first))))
    }

    /// The board of a job, if there is one.
    pub(super) fn find(&self, job: &JobId) -> Option<Arc<Board>> {
        self.boards.get(job).map(Arc::clone)
    }

    /// Writes an event onto a job's board, if it has one.
    pub(super) fn tell(&self, job: &JobId, event: JobEvent) {
        if let Some(board) = self.boards.get(job) {
            board.tell(event);
        }
    }

    /// Jobs that ended before this moment.
    pub(super) fn ended_before(&self, moment: Instant) -> Vec<JobId> {
        let over = |board: &Board| board.lock().ended.is_some_and(|at| at < moment);
        self.boards.iter().filter(|(_, board)| over(board)).map(|(job, _)| *job).collect()
    }

    /// Forgets a board; its followers read what they have not read yet.
    pub(super) fn forget(&mut self, job: &JobId) {
        self.boards.remove(job);
    }
}

impl Board {
    fn new(job: JobId, first: u64) -> Self {
        let log = Mutex::new(Log { events: VecDeque::new(), next: first, ended: None });
        Self { job, log, version: watch::Sender::new(first) }
    }

    /// The number that the next event will have.
    pub(super) fn next(&self) -> u64 {
        self.lock().next
    }

    fn tell(&self, event: JobEvent) {
        let mut log = self.lock();
        if log.ended.is_some() {
            return;
        }
        if matches!(event, JobEvent::Preview { .. }) {
            log.events.retain(|old| !matches!(old.event, JobEvent::Preview { .. }));
        }
        log.ended = event.is_final().then(Instant::now);
        let seq = log.next;
        log.next += 1;
        log.events.push_back(Progress { job: self.job, seq, event });
        if log.events.len() > MAX_EVENTS {
            log.events.pop_front();
        }
        self.version.send_replace(log.next);
    }

    /// Sends events from number `from` on until the job has ended or the follower has gone.
    pub(super) async fn follow(self: Arc<Self>, follower: ProgressSender, from: u64, previews: bool) {
        let mut version = self.version.subscribe();
        let mut from = from;
        loop {
            version.mark_unchanged();
            let (events, ended) = self.since(from);
            for event in events {
                from = event.seq + 1;
                let wanted = previews || !matches!(event.event, JobEvent::Preview { .. });
                if wanted && follower.send(event).await.is_err() {
                    return;
                }
            }
            if ended {
                return;
            }
            tokio::select! {
                changed = version.changed() => if changed.is_err() { return },
                () = follower.closed() => return,
            }
        }
    }

    /// A late follower gets at least the newest event, so that it knows where the job stands.
    fn since(&self, from: u64) -> (Vec<Progress>, bool) {
        let log = self.lock();
        let mut events: Vec<_> = log.events.iter().filter(|event| event.seq >= from).cloned().collect();
        if events.is_empty() && log.ended.is_some() {
            events.extend(log.events.back().cloned());
        }
        (events, log.ended.is_some())
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().expect("invariant: no panic while the lock is held")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn numbers(board: &Board, from: u64) -> Vec<u64> {
        board.since(from).0.iter().map(|event| event.seq).collect()
    }

    #[test]
    fn events_are_numbered_and_read_from_any_number_on() {
        let mut boards = Boards::default();
        let job = JobId::from_bytes([1; 32]);
        let board = boards.board(job, 0);
        boards.tell(&job, JobEvent::Loading);
        boards.tell(&job, JobEvent::Encoding);
        assert_eq!(numbers(&board, 0), [0, 1]);
        assert_eq!(numbers(&board, 1), [1]);
        assert!(numbers(&board, 2).is_empty());
    }

    #[test]
    fn nothing_follows_the_end_and_the_end_is_told_to_whoever_comes_late() {
        let mut boards = Boards::default();
        let job = JobId::from_bytes([1; 32]);
        let board = boards.board(job, 7);
        boards.tell(&job, JobEvent::Cancelled);
        boards.tell(&job, JobEvent::Loading);
        assert_eq!(numbers(&board, 0), [7]);
        assert_eq!(numbers(&board, 100), [7]);
    }

    #[test]
    fn a_board_keeps_one_preview_and_a_bounded_log() {
        let mut boards = Boards::default();
        let job = JobId::from_bytes([1; 32]);
        let board = boards.board(job, 0);
        for step in 0..2 * MAX_EVENTS as u32 {
            boards.tell(&job, JobEvent::Preview { step, png: Default::default() });
        }
        assert_eq!(numbers(&board, 0).len(), 1);
        for _ in 0..2 * MAX_EVENTS {
            boards.tell(&job, JobEvent::Loading);
        }
        assert_eq!(numbers(&board, 0).len(), MAX_EVENTS);
    }
}
