//! The one thread that writes: commands in, an answer after the commit.
//!
//! What waits when a commit begins goes into it together, in the order in which it came: a disk that syncs a hundred
//! times a second takes far more than a hundred jobs.

use std::sync::Arc;
use std::thread;

use kinoflock_protocol::codec;
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{ChainId, JobId};
use kinoflock_protocol::units::UnixMillis;
use redb::{ReadableTable, Table, WriteTransaction};
use tokio::sync::{mpsc, oneshot};

use super::record::{End, JobRecord, StoredState};
use super::tables::{JOBS, NONCES, RECEIPTS, decode, last_link, nonce_key};
use super::{MakeReceipt, QueueError};
use crate::disk::{Failure, Store, StoreError};

/// Commands of one commit at most.
const MAX_GROUP: usize = 64;

type Reply<T> = oneshot::Sender<Result<T, QueueError>>;

type JobsTable<'a> = Table<'a, &'static [u8; 32], &'static [u8]>;

pub(super) enum Command {
    Admit(Box<JobRecord>, Reply<()>),
    Start(JobId, UnixMillis, Reply<u32>),
    Requeue(JobId, bool, Reply<()>),
    Forget(JobId, Reply<()>),
    InputsReady(JobId, Reply<()>),
    End(JobId, End, UnixMillis, Reply<()>),
    Finish(JobId, UnixMillis, MakeReceipt, Reply<Envelope>),
    Acknowledge(JobId, Box<Envelope>, UnixMillis, Reply<()>),
    Sweep { acknowledged_before: UnixMillis, ended_before: UnixMillis, reply: Reply<Vec<JobId>> },
}

#[derive(Debug)]
pub(super) struct Writer {
    commands: mpsc::Sender<Command>,
    chain: ChainId,
}

impl Writer {
    pub(super) fn spawn(store: Arc<Store>, chain: ChainId, pending: usize) -> Result<Self, QueueError> {
        let (commands, mut inbox) = mpsc::channel(pending);
        let run = move || {
            let mut group = Vec::with_capacity(MAX_GROUP);
            while inbox.blocking_recv_many(&mut group, MAX_GROUP) > 0 {
                perform(&store, chain, &mut group);
            }
        };
        let thread = thread::Builder::new().name("job-store".to_owned()).spawn(run);
        thread.map_err(QueueError::Thread)?;
        Ok(Self { commands, chain })
    }

    pub(super) const fn chain(&self) -> ChainId {
        self.chain
    }

    pub(super) async fn send(&self, command: Command) -> Result<(), QueueError> {
        self.commands.send(command).await.map_err(|_| QueueError::Closed)
    }
}

/// Answers one who asked, once it is known whether the commit that held their command succeeded.
type Answer = Box<dyn FnOnce(Result<(), StoreError>)>;

/// Empties the group into one commit. A command that fails by its own fault writes nothing and hurts no other; when the
/// store fails, nothing of the group is written and everybody hears why.
fn perform(store: &Store, chain: ChainId, group: &mut Vec<Command>) {
    let mut answers = Vec::with_capacity(group.len());
    let committed: Result<(), StoreError> = store.write(|tx| {
        let mut all = Ok(());
        for command in group.drain(..) {
            let (answer, stored) = apply(tx, chain, command);
            answers.push(answer);
            all = all.and(stored);
        }
        all.map_err(Failure::Redb)
    });
    // The store could not even be opened.
    answers.extend(group.drain(..).map(refuse));
    for answer in answers {
        answer(committed.clone());
    }
}

fn apply(tx: &WriteTransaction, chain: ChainId, command: Command) -> (Answer, Result<(), redb::Error>) {
    match command {
        Command::Admit(record, reply) => settle(reply, admit(tx, &record)),
        Command::Start(job, now, reply) => settle(reply, start(tx, &job, now)),
        Command::Requeue(job, counts, reply) => settle(reply, requeue(tx, &job, counts)),
        Command::Forget(job, reply) => settle(reply, forget(tx, &job)),
        Command::InputsReady(job, reply) => settle(reply, inputs_ready(tx, &job)),
        Command::End(job, end, at, reply) => {
            settle(reply, change(tx, &job, |record| record.state = StoredState::Ended { at, end }))
        }
        Command::Finish(job, at, make, reply) => settle(reply, finish(tx, chain, &job, at, make)),
        Command::Acknowledge(job, answer, at, reply) => settle(reply, acknowledge(tx, &job, *answer, at)),
        Command::Sweep { acknowledged_before, ended_before, reply } => {
            settle(reply, sweep(tx, acknowledged_before, ended_before))
        }
    }
}

fn settle<T: 'static>(reply: Reply<T>, written: Written<T>) -> (Answer, Result<(), redb::Error>) {
    let (outcome, stored) = match written {
        Ok(value) => (Ok(value), Ok(())),
        Err(Failure::Body(error)) => (Err(error), Ok(())),
        // There is no commit then, and its error is what is told.
        Err(Failure::Redb(error)) => (Err(QueueError::Closed), Err(error)),
    };
    (answer(reply, outcome), stored)
}

/// Who asked may have gone; the write stands all the same.
fn answer<T: 'static>(reply: Reply<T>, outcome: Result<T, QueueError>) -> Answer {
    Box::new(move |committed| drop(reply.send(committed.map_err(QueueError::Store).and(outcome))))
}

fn refuse(command: Command) -> Answer {
    let closed = || QueueError::Closed;
    match command {
        Command::Start(_, _, reply) => answer(reply, Err(closed())),
        Command::Finish(_, _, _, reply) => answer(reply, Err(closed())),
        Command::Sweep { reply, .. } => answer(reply, Err(closed())),
        Command::Admit(_, reply)
        | Command::Requeue(_, _, reply)
        | Command::Forget(_, reply)
        | Command::InputsReady(_, reply)
        | Command::End(_, _, _, reply)
        | Command::Acknowledge(_, _, _, reply) => answer(reply, Err(closed())),
    }
}

/// Those below check first and write then: one that fails by [`Failure::Body`] has written nothing.
type Written<T> = Result<T, Failure<QueueError>>;

fn admit(tx: &WriteTransaction, record: &JobRecord) -> Written<()> {
    let mut jobs = tx.open_table(JOBS)?;
    if jobs.get(record.id.as_bytes())?.is_some() {
        return Ok(());
    }
    let mut nonces = tx.open_table(NONCES)?;
    let key = nonce_key(&record.origin.requester, &record.nonce);
    let holder = nonces.get(&key)?.map(|holder| JobId::from_bytes(*holder.value()));
    if let Some(holder) = holder {
        return Err(Failure::Body(QueueError::NonceUsed { holder }));
    }
    nonces.insert(&key, record.id.as_bytes())?;
    put(&mut jobs, record)
}

fn start(tx: &WriteTransaction, job: &JobId, now: UnixMillis) -> Written<u32> {
    change(tx, job, |record| {
        record.state = StoredState::Running;
        record.started_at = Some(now);
        record.starts += 1;
        record.starts
    })
}

fn requeue(tx: &WriteTransaction, job: &JobId, counts: bool) -> Written<()> {
    change(tx, job, |record| {
        record.state = StoredState::Waiting;
        if !counts {
            record.starts = record.starts.saturating_sub(1);
        }
    })
}

fn inputs_ready(tx: &WriteTransaction, job: &JobId) -> Written<()> {
    change(tx, job, |record| record.needs_inputs = false)
}

fn finish(
    tx: &WriteTransaction,
    chain: ChainId,
    job: &JobId,
    at: UnixMillis,
    make: MakeReceipt,
) -> Written<Envelope> {
    let mut jobs = tx.open_table(JOBS)?;
    let mut record = live(&jobs, job)?;
    let mut receipts = tx.open_table(RECEIPTS)?;
    let link = last_link(&receipts, chain)?;
    let (id, envelope) = make(link).map_err(|text| Failure::Body(QueueError::Receipt(text)))?;
    receipts
        .insert((chain.as_bytes(), link.sequence), (id.as_bytes(), codec::encode(&envelope).as_slice()))?;
    record.state = StoredState::Done { at, chain, sequence: link.sequence };
    put(&mut jobs, &record)?;
    Ok(envelope)
}

fn acknowledge(tx: &WriteTransaction, job: &JobId, answer: Envelope, at: UnixMillis) -> Written<()> {
    let mut jobs = tx.open_table(JOBS)?;
    let mut record = get(&jobs, job)?;
    record.answer = Some((answer, at));
    put(&mut jobs, &record)
}

fn sweep(
    tx: &WriteTransaction,
    acknowledged_before: UnixMillis,
    ended_before: UnixMillis,
) -> Written<Vec<JobId>> {
    let mut jobs = tx.open_table(JOBS)?;
    let mut nonces = tx.open_table(NONCES)?;
    let mut over = Vec::new();
    for row in jobs.iter()? {
        let record: JobRecord = decode("job", row?.1.value())?;
        let ended = record.ended_at().is_some_and(|at| at < ended_before);
        let acknowledged = record.answer.as_ref().is_some_and(|(_, at)| *at < acknowledged_before);
        if record.ended_at().is_some() && (ended || acknowledged) {
            over.push((record.id, nonce_key(&record.origin.requester, &record.nonce)));
        }
    }
    for (job, nonce) in &over {
        jobs.remove(job.as_bytes())?;
        nonces.remove(nonce)?;
    }
    Ok(over.into_iter().map(|(job, _)| job).collect())
}

fn forget(tx: &WriteTransaction, job: &JobId) -> Written<()> {
    let mut jobs = tx.open_table(JOBS)?;
    let record = get(&jobs, job)?;
    if record.ended_at().is_none() {
        return Err(Failure::Body(QueueError::Live { job: *job }));
    }
    jobs.remove(job.as_bytes())?;
    tx.open_table(NONCES)?.remove(&nonce_key(&record.origin.requester, &record.nonce))?;
    Ok(())
}

/// Changes a live job.
fn change<T>(tx: &WriteTransaction, job: &JobId, with: impl FnOnce(&mut JobRecord) -> T) -> Written<T> {
    let mut jobs = tx.open_table(JOBS)?;
    let mut record = live(&jobs, job)?;
    let value = with(&mut record);
    put(&mut jobs, &record)?;
    Ok(value)
}

fn live(jobs: &JobsTable<'_>, job: &JobId) -> Written<JobRecord> {
    let record = get(jobs, job)?;
    if record.ended_at().is_some() {
        return Err(Failure::Body(QueueError::Over { job: *job }));
    }
    Ok(record)
}

fn get(jobs: &JobsTable<'_>, job: &JobId) -> Written<JobRecord> {
    let row = jobs.get(job.as_bytes())?.ok_or(Failure::Body(QueueError::Unknown { job: *job }))?;
    decode("job", row.value())
}

fn put(jobs: &mut JobsTable<'_>, record: &JobRecord) -> Written<()> {
    jobs.insert(record.id.as_bytes(), codec::encode(record).as_slice())?;
    Ok(())
}
