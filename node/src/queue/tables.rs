//! The tables, and how they are read.

use std::path::Path;

use kinoflock_protocol::codec;
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{ChainId, JobId, Nonce, ReceiptId, RequesterId};
use redb::{ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;

use super::record::{JobRecord, Link};
use super::{QueueError, SCHEMA};
use crate::disk::{Failure, Store, StoreError};

/// Job id -> [`JobRecord`].
pub(super) const JOBS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("jobs");
/// Requester and nonce -> job id.
pub(super) const NONCES: TableDefinition<'_, &[u8; 48], &[u8; 32]> = TableDefinition::new("nonces");
/// A chain and a place in it.
pub(super) type Place = (&'static [u8; 32], u64);
/// A receipt's id and its envelope.
pub(super) type Signed = (&'static [u8; 32], &'static [u8]);

/// Every receipt of every chain of this node.
pub(super) const RECEIPTS: TableDefinition<'_, Place, Signed> = TableDefinition::new("receipts");

/// Most bytes of a stored record: two envelopes, an answer and some figures.
pub(super) const MAX_RECORD: usize = 4 * kinoflock_protocol::limits::MAX_ENVELOPE;

pub(super) fn open(path: &Path) -> Result<Store, StoreError> {
    Store::open(path, SCHEMA, |tx| {
        tx.open_table(JOBS)?;
        tx.open_table(NONCES)?;
        tx.open_table(RECEIPTS)?;
        Ok(())
    })
}

pub(super) fn find(store: &Store, job: &JobId) -> Result<Option<JobRecord>, QueueError> {
    store.read(|tx| {
        let row = tx.open_table(JOBS)?.get(job.as_bytes())?;
        row.map(|bytes| decode("job", bytes.value())).transpose()
    })
}

pub(super) fn all(store: &Store) -> Result<Vec<JobRecord>, QueueError> {
    store.read(|tx| {
        let mut records = Vec::new();
        for row in tx.open_table(JOBS)?.iter()? {
            records.push(decode::<JobRecord>("job", row?.1.value())?);
        }
        records.sort_by_key(|record| record.seq);
        Ok(records)
    })
}

pub(super) fn nonce_holder(
    store: &Store,
    requester: &RequesterId,
    nonce: &Nonce,
) -> Result<Option<JobId>, QueueError> {
    store.read(|tx| {
        let row = tx.open_table(NONCES)?.get(&nonce_key(requester, nonce))?;
        Ok(row.map(|job| JobId::from_bytes(*job.value())))
    })
}

pub(super) fn receipt(store: &Store, chain: ChainId, sequence: u64) -> Result<Option<Envelope>, QueueError> {
    store.read(|tx| {
        let row = tx.open_table(RECEIPTS)?.get((chain.as_bytes(), sequence))?;
        row.map(|row| decode("receipt", row.value().1)).transpose()
    })
}

pub(super) fn next_link(store: &Store, chain: ChainId) -> Result<Link, QueueError> {
    store.read(|tx| Ok(last_link(&tx.open_table(RECEIPTS)?, chain)?))
}

/// The place after the last receipt of the chain.
pub(super) fn last_link(
    table: &impl ReadableTable<Place, Signed>,
    chain: ChainId,
) -> Result<Link, redb::StorageError> {
    let key = chain.as_bytes();
    let last = table.range((key, 0)..=(key, u64::MAX))?.next_back().transpose()?;
    Ok(match last {
        Some((place, receipt)) => Link {
            chain,
            sequence: place.value().1 + 1,
            previous: Some(ReceiptId::from_bytes(*receipt.value().0)),
        },
        None => Link { chain, sequence: 0, previous: None },
    })
}

pub(super) fn nonce_key(requester: &RequesterId, nonce: &Nonce) -> [u8; 48] {
    let mut key = [0; 48];
    key[..32].copy_from_slice(requester.as_bytes());
    key[32..].copy_from_slice(nonce.as_bytes());
    key
}

pub(super) fn decode<T: DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
) -> Result<T, Failure<QueueError>> {
    codec::decode(bytes, MAX_RECORD).map_err(|source| Failure::Body(QueueError::Record { what, source }))
}
