//! The one thread that writes: commands in, one transaction each, an answer after its commit.

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
use crate::disk::{Failure, Store};

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
            while let Some(command) = inbox.blocking_recv() {
                perform(&store, chain, command);
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

/// Who asked may have gone; the write stands all the same.
fn perform(store: &Store, chain: ChainId, command: Command) {
    match command {
        Command::Admit(record, reply) => drop(reply.send(store.write(|tx| admit(tx, &record)))),
        Command::Start(job, now, reply) => drop(reply.send(store.write(|tx| start(tx, &job, now)))),
        Command::Requeue(job, counts, reply) => drop(reply.send(store.write(|tx| requeue(tx, &job, counts)))),
        Command::Forget(job, reply) => drop(reply.send(store.write(|tx| forget(tx, &job)))),
        Command::InputsReady(job, reply) => drop(reply.send(store.write(|tx| inputs_ready(tx, &job)))),
        Command::End(job, end, at, reply) => {
            drop(reply.send(
                store.write(|tx| change(tx, &job, |record| record.state = StoredState::Ended { at, end })),
            ));
        }
        Command::Finish(job, at, make, reply) => {
            drop(reply.send(store.write(|tx| finish(tx, chain, &job, at, make))))
        }
        Command::Acknowledge(job, answer, at, reply) => {
            drop(reply.send(store.write(|tx| acknowledge(tx, &job, *answer, at))));
        }
        Command::Sweep { acknowledged_before, ended_before, reply } => {
            drop(reply.send(store.write(|tx| sweep(tx, acknowledged_before, ended_before))));
        }
    }
}

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
    let mut receipts = tx.open_table(RECEIPTS)?;
    let link = last_link(&receipts, chain)?;
    let (id, envelope) = make(link).map_err(|text| Failure::Body(QueueError::Receipt(text)))?;
    receipts
        .insert((chain.as_bytes(), link.sequence), (id.as_bytes(), codec::encode(&envelope).as_slice()))?;
    change(tx, job, |record| record.state = StoredState::Done { at, chain, sequence: link.sequence })?;
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
    let mut record = get(&jobs, job)?;
    if record.ended_at().is_some() {
        return Err(Failure::Body(QueueError::Over { job: *job }));
    }
    let value = with(&mut record);
    put(&mut jobs, &record)?;
    Ok(value)
}

fn get(jobs: &JobsTable<'_>, job: &JobId) -> Written<JobRecord> {
    let row = jobs.get(job.as_bytes())?.ok_or(Failure::Body(QueueError::Unknown { job: *job }))?;
    decode("job", row.value())
}

fn put(jobs: &mut JobsTable<'_>, record: &JobRecord) -> Written<()> {
    jobs.insert(record.id.as_bytes(), codec::encode(record).as_slice())?;
    Ok(())
}
