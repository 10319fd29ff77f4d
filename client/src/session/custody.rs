//! What other nodes hold for a job: custodians that watch it, sealed copies of its clip; and forgetting it everywhere.
//!
//! A custodian has the signed job and may hand it on. So whoever looks for a lost job first asks those who hold something
//! for it: the clip may be made already, or another node may be at it.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use kinoflock_net::Multiaddr;
use kinoflock_net::sealed::open_file;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::custody::{Content, Custody, Held, HeldItem};
use kinoflock_protocol::names::NodeAddress;
use kinoflock_protocol::progress::Checkpoint;
use kinoflock_protocol::query::{JobQuery, QueryAction};
use kinoflock_protocol::receipt::ValidReceipt;
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::seal::{SealKey, open_bytes};
use kinoflock_protocol::{Envelope, JobId, NodeId, Reason, ValidJob};

use super::find::{Found, unexpected};
use super::{Client, Event, Events, SessionError, nonce};
use crate::route::Candidate;
use crate::store::{Custodian, Former, Holder, JobRecord, RecordState, StoreError};
use crate::ticket::{address_of, parse_addresses};
use crate::verify;

/// Time for one custodian or holder to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How often a custodian is told of a job whose inputs it has to fetch first.
const CUSTODY_TRIES: u32 = 20;
/// Pause between two such tries.
const CUSTODY_PAUSE: Duration = Duration::from_millis(500);
/// Custodians that are tried beyond those wanted: some may be out of reach.
const SPARE_CUSTODIANS: usize = 2;
/// Nodes that are asked what they hold for a job, beside those that are known to hold something.
const ASKED_AT_RANDOM: usize = 8;

/// What a node said to a request to forget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forgotten {
    /// Which node.
    pub node: NodeId,
    /// Whether it had anything; else it knows of no such job of this key.
    pub had: bool,
    /// Why it may not have forgotten; nothing if it confirmed.
    pub error: Option<String>,
}

impl Client {
    /// The nodes that are to watch a job which `chosen` runs: those that can be reached, the most reliable first, and
    /// among equals not always the same.
    pub(super) async fn choose_custodians(
        &self,
        found: &[Found],
        chosen: &NodeId,
        wanted: usize,
    ) -> Vec<Custodian> {
        let now = crate::now();
        let mut others: Vec<&Found> = found.iter().filter(|found| found.candidate.node != *chosen).collect();
        let dice = super::random().unwrap_or_default().to_le_bytes();
        let lot = |node: &NodeId| *blake3::hash(&[node.as_bytes().as_slice(), &dice].concat()).as_bytes();
        let doubt = |found: &Found| ((1.0 - found.candidate.seen.reliability(now)) * 1e6) as u64;
        others.sort_by_key(|found| {
            let Candidate { seen, node, .. } = &found.candidate;
            (seen.is_avoided(now), doubt(found), lot(node))
        });
        let custodian = |found: &Found| Custodian {
            node: found.candidate.node,
            name: found.candidate.capacity.name.to_string(),
            addresses: found.addresses.iter().map(ToString::to_string).collect(),
            told: false,
        };
        others.truncate(if wanted == 0 { 0 } else { wanted + SPARE_CUSTODIANS });
        let trying = others.into_iter().map(|found| async move {
            let reached = self.connect_within(found.candidate.node, found.addresses.clone()).await;
            reached.ok().map(|()| found)
        });
        join_all(trying).await.into_iter().flatten().take(wanted).map(custodian).collect()
    }

    /// Tells a job's custodians where it runs. One that does not hear it is told again when the job moves.
    pub(super) async fn tell_custodians(&self, job: &JobId, events: &Events) -> Result<(), SessionError> {
        let record = self.store.job(job)?;
        let others = record.custodians.iter().filter(|custodian| custodian.node != record.node);
        let told = others.map(|custodian| async {
            (custodian.node, self.tell_custodian(&record, custodian).await.map_err(|error| error.to_string()))
        });
        let told: BTreeMap<NodeId, Result<(), String>> = join_all(told).await.into_iter().collect();
        if told.is_empty() {
            return Ok(());
        }
        for (node, error) in told.iter().filter_map(|(node, told)| Some((node, told.as_ref().err()?))) {
            events.tell(Event::NoCustodian { node: *node, why: error.clone() }).await;
        }
        self.update(job, |record| {
            for custodian in &mut record.custodians {
                custodian.told = matches!(told.get(&custodian.node), Some(Ok(())));
            }
        })?;
        Ok(())
    }

    async fn tell_custodian(&self, record: &JobRecord, custodian: &Custodian) -> Result<(), SessionError> {
        let node = custodian.node;
        let addresses = record.addresses.iter().filter_map(|address| Text::new(address.as_str()).ok());
        let custody = Custody {
            job: record.job,
            custodian: node,
            runs_at: NodeAddress { id: record.node, addresses: List::first_of(addresses) },
            issued_at: crate::now(),
        };
        let custody = Envelope::seal(&self.key, &self.network, &custody)?;
        self.connect_within(node, parse_addresses(&custodian.addresses)).await?;
        for _ in 0..CUSTODY_TRIES {
            let request = Request::Custody { custody: custody.clone(), job: record.envelope.clone() };
            match self.net.request_within(node, request, ANSWER_WITHIN).await? {
                Response::Acknowledged => return Ok(()),
                Response::Busy { .. } => tokio::time::sleep(CUSTODY_PAUSE).await,
                other => return Err(unexpected(node, "a job to watch", other)),
            }
        }
        let given = "that it is busy".to_owned();
        Err(SessionError::Unexpected { node, asked: "a job to watch", given })
    }

    /// Looks for a job whose node is lost among those who hold something for it. True if it was found: its receipt with a
    /// sealed clip, or another node that runs it.
    pub(super) async fn elsewhere(&self, record: &JobRecord, found: &[Found]) -> Result<bool, SessionError> {
        let asked = self.may_hold(record, found);
        let asking = asked.into_iter().map(|(node, addresses)| async move {
            let held = self.ask_held(record, node, addresses).await;
            if let Err(error) = &held {
                tracing::debug!(node = %node.short(), %error, "a holder could not be asked");
            }
            Some((node, held.ok()?))
        });
        let answers: Vec<(NodeId, Held)> = join_all(asking).await.into_iter().flatten().collect();
        let job = ValidJob::parse_stored(&record.envelope, &record.network).map_err(|error| {
            let path = self.store.job_path(&record.job);
            StoreError::Record { path, reason: error.to_string() }
        })?;
        let key = SealKey::of_job(&record.envelope);
        for (holder, item) in of_content(&answers, Content::Clip) {
            if let Some((receipt, node)) = self.opened_receipt(item, &key, &job) {
                self.adopt(record, node, Vec::new(), Some((receipt, holder, item.sealed)))?;
                return Ok(true);
            }
        }
        for (holder, item) in of_content(&answers, Content::Checkpoint) {
            self.take_checkpoint(record, &answers, holder, item, &key).await;
        }
        let had = |node: &NodeId| record.former.iter().any(|former| former.node == *node);
        let elsewhere = answers.iter().filter_map(|(_, held)| held.runs_at.as_ref());
        match elsewhere.into_iter().find(|at| at.id != record.node && !had(&at.id)) {
            Some(at) => {
                self.adopt(record, at.id, address_of(at).1, None)?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    fn may_hold(&self, record: &JobRecord, found: &[Found]) -> BTreeMap<NodeId, Vec<Multiaddr>> {
        let custodians =
            record.custodians.iter().map(|custodian| (custodian.node, parse_addresses(&custodian.addresses)));
        let holders = record.holders.iter().map(|holder| (holder.node, Vec::new()));
        let others = found.iter().take(ASKED_AT_RANDOM).map(|f| (f.candidate.node, f.addresses.clone()));
        let mut asked: BTreeMap<NodeId, Vec<Multiaddr>> = BTreeMap::new();
        for (node, addresses) in custodians.chain(holders).chain(others) {
            asked.entry(node).or_default().extend(addresses);
        }
        // Custodians that the job names and that this process never met: the swarm may know where they are.
        if let Ok(job) = ValidJob::parse_stored(&record.envelope, &record.network) {
            for node in job.spec().custodians.iter() {
                asked.entry(*node).or_default();
            }
        }
        asked.remove(&self.net.local_node());
        asked.remove(&self.key.node_id());
        asked.remove(&record.node);
        asked
    }

    async fn ask_held(
        &self,
        record: &JobRecord,
        node: NodeId,
        addresses: Vec<Multiaddr>,
    ) -> Result<Held, SessionError> {
        self.connect_within(node, addresses).await?;
        let query = self.query_to(&record.job, node, QueryAction::Held)?;
        match self.net.request_within(node, Request::Held(query), ANSWER_WITHIN).await? {
            Response::Held(held) => Ok(held),
            other => Err(unexpected(node, "a question for what it holds", other)),
        }
    }

    /// The receipt that a holder keeps, if it is one for this job, and the node that signed it.
    fn opened_receipt(&self, item: &HeldItem, key: &SealKey, job: &ValidJob) -> Option<(Envelope, NodeId)> {
        let envelope = Envelope::decode(&open_bytes(key, &item.statement).ok()?).ok()?;
        let node = ValidReceipt::parse(&envelope, &self.network).ok()?.receipt().node;
        verify::receipt(&envelope, &self.network, job, &node).ok()?;
        Some((envelope, node))
    }

    /// Takes over a newer checkpoint that a custodian holds, if a node signed it that had the job.
    async fn take_checkpoint(
        &self,
        record: &JobRecord,
        answers: &[(NodeId, Held)],
        holder: NodeId,
        item: &HeldItem,
        key: &SealKey,
    ) {
        let opened = open_bytes(key, &item.statement).ok().and_then(|bytes| Envelope::decode(&bytes).ok());
        let Some(envelope) = opened else { return };
        let Ok(opened) = envelope.open::<Checkpoint>(&self.network) else { return };
        let signer = NodeId::from(opened.signer);
        let had_it = signer == record.node
            || record.former.iter().any(|former| former.node == signer)
            || answers.iter().any(|(_, held)| held.runs_at.as_ref().is_some_and(|at| at.id == signer));
        let ours = record.checkpoint.as_ref().and_then(|ours| ours.open::<Checkpoint>(&self.network).ok());
        let newer = ours.is_none_or(|ours| ours.value.step < opened.value.step);
        let fits = opened.value.job == record.job && opened.value.state == item.sealed;
        if !(had_it && newer && fits) {
            return;
        }
        let kept = match self.fetch_to_store(&item.sealed, &[holder], &Events::none()).await {
            Ok(_) => self.update(&record.job, |record| record.checkpoint = Some(envelope)).map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            tracing::debug!(job = %record.job.short(), %error, "a held checkpoint could not be had");
        }
    }

    /// Another node has the job, or made it already.
    fn adopt(
        &self,
        record: &JobRecord,
        node: NodeId,
        addresses: Vec<Multiaddr>,
        made: Option<(Envelope, NodeId, BlobRef)>,
    ) -> Result<(), SessionError> {
        self.update(&record.job, |record| {
            if node != record.node {
                record.former.push(Former::of(record, "unreachable"));
                record.node = node;
                record.node_name = String::new();
                record.addresses = addresses.iter().map(ToString::to_string).collect();
                record.clock_skew_ms = 0;
                record.next_seq = 0;
                record.told = None;
            }
            record.error = None;
            record.state = if made.is_some() { RecordState::Made } else { RecordState::Queued };
            if let Some((receipt, holder, sealed)) = made {
                record.receipt = Some(receipt);
                record.holders.retain(|known| known.node != holder);
                record.holders.push(Holder { node: holder, sealed: Some(sealed) });
            }
        })?;
        Ok(())
    }

    /// Asks a node whether it holds the sealed clip, by a receipt that its maker signed; if so, that is kept.
    pub(super) async fn ask_mirror(
        &self,
        record: &JobRecord,
        holder: NodeId,
        addresses: Vec<Multiaddr>,
    ) -> Result<bool, SessionError> {
        let answers = [(holder, self.ask_held(record, holder, addresses).await?)];
        let job = ValidJob::parse_stored(&record.envelope, &record.network).map_err(|error| {
            let path = self.store.job_path(&record.job);
            StoreError::Record { path, reason: error.to_string() }
        })?;
        let key = SealKey::of_job(&record.envelope);
        for (_, item) in of_content(&answers, Content::Clip) {
            let made = self.opened_receipt(item, &key, &job);
            if made.is_some_and(|(_, node)| node == record.node) {
                self.update(&record.job, |record| {
                    record.holders.retain(|known| known.node != holder);
                    record.holders.push(Holder { node: holder, sealed: Some(item.sealed) });
                })?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Forgets that a node would hold the clip.
    pub(super) fn drop_holder(&self, record: &JobRecord, holder: &NodeId) -> Result<(), SessionError> {
        self.update(&record.job, |record| record.holders.retain(|known| known.node != *holder)).map(drop)
    }

    /// Fetches a clip from those who hold it sealed, and opens it. False if nobody is known to.
    pub(super) async fn fetch_sealed(
        &self,
        record: &JobRecord,
        clip: &BlobRef,
        events: &Events,
    ) -> Result<bool, SessionError> {
        let Some(sealed) = record.holders.iter().find_map(|holder| holder.sealed) else { return Ok(false) };
        let holders = record.holders.iter().filter(|holder| holder.sealed == Some(sealed));
        let holders: Vec<NodeId> = holders.map(|holder| holder.node).collect();
        let from = self.fetch_to_store(&sealed, &holders, events).await?;
        let to = self.store.fetch_path(&clip.id, true);
        let key = SealKey::of_job(&record.envelope);
        let opened = open_file(&key, &clip.id, &from, &to).map_err(StoreError::io("open the sealed", &from));
        self.store.remove_blob(&sealed.id)?;
        opened?;
        self.store.adopt_blob(&clip.id, &to)?;
        Ok(true)
    }

    /// Tells those who hold something for a job that its requester has the clip: they need not hold it any more.
    pub(super) async fn answer_holders(&self, record: &JobRecord) {
        let Some(answer) = &record.answer else { return };
        let mut asked = self.may_hold(record, &[]);
        asked.retain(|node, _| {
            record.custodians.iter().any(|custodian| custodian.node == *node && custodian.told)
                || record.holders.iter().any(|holder| holder.node == *node)
        });
        let telling = asked.into_iter().map(|(node, addresses)| async move {
            self.connect_within(node, addresses).await?;
            let answer = Request::Answer(answer.clone());
            self.net.request_within(node, answer, ANSWER_WITHIN).await.map_err(SessionError::from)
        });
        for told in join_all(telling).await {
            // One that does not hear it keeps its sealed bytes until their time is over.
            if let Err(error) = told {
                tracing::debug!(%error, "a holder was not told");
            }
        }
    }

    /// Asks every node that had a job or holds something for it to forget it: clip, latents, checkpoints, prompt. Receipts
    /// stay. Nothing is removed here.
    ///
    /// # Errors
    /// When the job's record cannot be read.
    pub async fn forget(&self, job: &JobId) -> Result<Vec<Forgotten>, SessionError> {
        let record = self.store.job(job)?;
        let mut asked = self.may_hold(&record, &[]);
        asked.insert(record.node, parse_addresses(&record.addresses));
        for former in &record.former {
            asked.insert(former.node, parse_addresses(&former.addresses));
        }
        let asking = asked.into_iter().map(|(node, addresses)| async move {
            match self.ask_to_forget(job, node, addresses).await {
                Ok(had) => Forgotten { node, had, error: None },
                Err(error) => Forgotten { node, had: true, error: Some(error.to_string()) },
            }
        });
        Ok(join_all(asking).await)
    }

    async fn ask_to_forget(
        &self,
        job: &JobId,
        node: NodeId,
        addresses: Vec<Multiaddr>,
    ) -> Result<bool, SessionError> {
        self.connect_within(node, addresses).await?;
        let query = self.query_to(job, node, QueryAction::Forget)?;
        match self.net.request_within(node, Request::Forget(query), ANSWER_WITHIN).await? {
            Response::Forgotten { .. } => Ok(true),
            Response::Refused(refusal) if refusal.reason == Reason::JobUnknown => Ok(false),
            other => Err(unexpected(node, "a request to forget", other)),
        }
    }

    async fn connect_within(&self, node: NodeId, addresses: Vec<Multiaddr>) -> Result<(), SessionError> {
        match tokio::time::timeout(ANSWER_WITHIN, self.net.connect(node, addresses)).await {
            Ok(connected) => Ok(connected.map(drop)?),
            Err(_) => {
                let why = format!("no answer within {} s", ANSWER_WITHIN.as_secs());
                Err(kinoflock_net::NetError::Dial { target: node.to_string(), why }.into())
            }
        }
    }

    fn query_to(&self, job: &JobId, node: NodeId, action: QueryAction) -> Result<Envelope, SessionError> {
        let issued_at = crate::now();
        let query = JobQuery { job: *job, action, node, issued_at, nonce: nonce()? };
        Ok(Envelope::seal(&self.key, &self.network, &query)?)
    }
}

fn of_content(answers: &[(NodeId, Held)], wanted: Content) -> impl Iterator<Item = (NodeId, &HeldItem)> {
    let items = answers.iter().flat_map(|(node, held)| held.items.iter().map(|item| (*node, item)));
    items.filter(move |(_, item)| item.content == wanted)
}
