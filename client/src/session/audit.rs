//! Audits of finished jobs by other nodes: whom to ask, what came of it, and what that says of the maker.
//!
//! A node does not know which of its jobs will be audited: every job asks it to commit to its steps, and only when the clip
//! is here is it drawn whether this one is looked at. At random only nodes are asked that the artist was told of before the
//! job was sent. That nobody audits never harms a clip.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use kinoflock_net::Multiaddr;
use kinoflock_net::multiaddr::Protocol;
use kinoflock_protocol::audit::{
    AuditGrant, AuditObstacle, AuditOrder, AuditOutcome, AuditState, AuditVerdict,
};
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::limits::AUDIT_SHOWN_MS;
use kinoflock_protocol::names::NodeAddress;
use kinoflock_protocol::receipt::ValidReceipt;
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::{Envelope, JobId, JobSpec, Millis, NodeId, PublicKey};

use super::find::{Found, unexpected};
use super::{Client, Events, SessionError, random};
use crate::route::experience::Fault;
use crate::route::{Candidate, Needs, called, rank};
use crate::store::{Auditor, JobRecord, MAX_VERDICTS, RecordState, StoreError};
use crate::ticket::{Way, parse_addresses};

/// Nodes that the artist is told of as possible auditors, and that are asked one after the other.
const MAX_AUDITORS: usize = 3;
/// How long a grant holds.
const GRANT_LIFE: Millis = Millis(3_600_000);
/// Time for one answer of an auditor.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Pause before an auditor is asked again; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// Share of a whole, in percent.
const WHOLE: u64 = 100;

/// What an auditor said.
#[derive(Debug, Clone)]
pub struct Audited {
    /// Its verdict, whose signature was checked.
    pub verdict: AuditVerdict,
    /// As people call it.
    pub auditor: String,
    /// As people call the node whose work was looked at.
    pub maker: String,
}

impl Client {
    /// The nodes that may audit a job which `chosen` runs: those that could run it themselves, of other networks first,
    /// among equals the more reliable.
    pub(super) fn choose_auditors(&self, found: &[Found], needs: &Needs, chosen: &NodeId) -> Vec<Auditor> {
        let now = crate::now();
        let candidates: Vec<Candidate> = found.iter().map(|found| found.candidate.clone()).collect();
        let maker = found.iter().find(|found| found.candidate.node == *chosen).map(networks);
        let (fit, _) = rank(&candidates, needs, now);
        let mut fit: Vec<&Found> = fit
            .iter()
            .filter(|ranked| ranked.node != *chosen && !ranked.is_avoided)
            .map(|ranked| &found[ranked.index])
            .collect();
        let is_near =
            |found: &Found| maker.as_ref().is_some_and(|maker| !maker.is_disjoint(&networks(found)));
        let doubt = |found: &Found| ((1.0 - found.candidate.seen.reliability(now)) * 1e6) as u64;
        fit.sort_by_key(|found| (is_near(found), doubt(found), found.candidate.node));
        fit.into_iter().take(MAX_AUDITORS).map(auditor).collect()
    }

    /// The nodes found by these ways that may audit a job; all of them if they were named.
    ///
    /// # Errors
    /// When the job cannot be read, or no node is found.
    pub async fn find_auditors(
        &self,
        job: &JobId,
        ways: &[Way],
        named: bool,
        events: &Events,
    ) -> Result<Vec<Auditor>, SessionError> {
        let record = self.store.job(job)?;
        let found = if named { self.find_named(ways, events).await } else { self.find(ways, events).await }?;
        if named {
            return Ok(found.iter().map(auditor).take(MAX_AUDITORS).collect());
        }
        let spec = record.envelope.open::<JobSpec>(&record.network)?.value;
        let needs = Needs {
            model: spec.model,
            shape: spec.shape(),
            work: kinoflock_protocol::Work(0),
            input_bytes: 0,
            require_terms: record.require_terms,
        };
        Ok(self.choose_auditors(&found, &needs, &record.node))
    }

    /// Has a delivered job audited if it is drawn, which is decided once. Nothing if it is not.
    ///
    /// # Errors
    /// As [`Client::audit`]; the clip is as good as without.
    pub async fn audit_if_drawn(
        &self,
        job: &JobId,
        within: Duration,
    ) -> Result<Option<Audited>, SessionError> {
        let record = self.store.job(job)?;
        let audits = &record.audits;
        if audits.drawn.is_some() || audits.share == 0 || record.state != RecordState::Done {
            return Ok(None);
        }
        let drawn = random()? % WHOLE < u64::from(audits.share);
        self.update(job, |record| record.audits.drawn = Some(drawn))?;
        if !drawn || audits.auditors.is_empty() {
            return Ok(None);
        }
        self.audit(job, &audits.auditors, within).await.map(Some)
    }

    /// Has a finished job audited by the first of these nodes that does it.
    ///
    /// # Errors
    /// `NotCommitted` when there is nothing to look at; `NotAudited` with each node's reason.
    pub async fn audit(
        &self,
        job: &JobId,
        auditors: &[Auditor],
        within: Duration,
    ) -> Result<Audited, SessionError> {
        let (record, until) = (self.store.job(job)?, Instant::now() + within);
        let receipt = self.committed(&record)?;
        let mut reasons = Vec::new();
        for auditor in auditors.iter().filter(|auditor| auditor.node != record.node) {
            let left = until.saturating_duration_since(Instant::now());
            let asked = tokio::time::timeout(left, self.ask_auditor(&record, &receipt, auditor)).await;
            let why = match asked {
                Ok(Ok((verdict, envelope))) => {
                    self.note_verdict(&record, &receipt, &verdict, envelope)?;
                    let maker = called(&record.node_name, &record.node);
                    return Ok(Audited { verdict, auditor: called(&auditor.name, &auditor.node), maker });
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no verdict within {}", Millis::from(within)),
            };
            reasons.push((called(&auditor.name, &auditor.node), why));
        }
        Err(SessionError::NotAudited { job: *job, reasons })
    }

    /// The receipt, if its node committed to its steps. One that was asked to and did not can never be looked at: that is
    /// its fault.
    fn committed(&self, record: &JobRecord) -> Result<ValidReceipt, SessionError> {
        let not = |asked| SessionError::NotCommitted { job: record.job, asked };
        let receipt = record.receipt.as_ref().ok_or_else(|| not(false))?;
        let receipt = ValidReceipt::parse(receipt, &record.network).map_err(|error| {
            let path = self.store.job_path(&record.job);
            StoreError::Record { path, reason: error.to_string() }
        })?;
        if receipt.receipt().step_root.is_some() {
            return Ok(receipt);
        }
        let asked = record.envelope.open::<JobSpec>(&record.network)?.value.returns.step_root;
        if asked {
            self.remember_fault(record, Fault::Withheld);
        }
        Err(not(asked))
    }

    /// Orders an audit and waits for its verdict.
    async fn ask_auditor(
        &self,
        record: &JobRecord,
        receipt: &ValidReceipt,
        auditor: &Auditor,
    ) -> Result<(AuditVerdict, Envelope), SessionError> {
        let issued_at = crate::now();
        let grant = AuditGrant {
            job: record.job,
            receipt: receipt.id(),
            auditor: PublicKey::from(auditor.node),
            issued_at,
            expires_at: issued_at.plus(GRANT_LIFE),
        };
        let addresses = record.addresses.iter().filter_map(|address| Text::new(address.as_str()).ok());
        let order = AuditOrder {
            job: record.envelope.clone(),
            receipt: record.receipt.clone().expect("invariant: it was just parsed"),
            grant: Envelope::seal(&self.key, &self.network, &grant)?,
            maker: NodeAddress { id: record.node, addresses: List::first_of(addresses) },
        };
        // What the auditor compares with: its maker need not keep the clip any more.
        let spec = record.envelope.open::<JobSpec>(&record.network)?.value;
        let given = spec.initial_latents.into_iter().chain(spec.adapters.iter().map(|used| used.weights));
        self.inputs.serve(record.clip.into_iter().chain(given).map(|blob| blob.id));
        self.net.connect(auditor.node, parse_addresses(&auditor.addresses)).await?;
        let mut pause = FIRST_PAUSE;
        loop {
            let request = Request::OrderAudit(Box::new(order.clone()));
            match self.net.request_within(auditor.node, request, ANSWER_WITHIN).await {
                Ok(Response::AuditState(AuditState::Done(envelope))) => {
                    let verdict = AuditVerdict::parse(&envelope, &self.network, &auditor.node, receipt)?;
                    return Ok((verdict, envelope));
                }
                Ok(Response::AuditState(AuditState::Waiting | AuditState::Looking))
                | Ok(Response::Busy { .. }) => {}
                Err(error) if error.is_transient() => {}
                Ok(other) => return Err(unexpected(auditor.node, "an order for an audit", other)),
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Keeps a verdict, and what it says of the maker.
    fn note_verdict(
        &self,
        record: &JobRecord,
        receipt: &ValidReceipt,
        verdict: &AuditVerdict,
        envelope: Envelope,
    ) -> Result<(), SessionError> {
        self.update(&record.job, |record| {
            let verdicts = &mut record.audits.verdicts;
            verdicts.push(envelope);
            verdicts.drain(..verdicts.len().saturating_sub(MAX_VERDICTS));
        })?;
        let now = crate::now();
        let age = now.since(receipt.receipt().finished_at);
        match &verdict.outcome {
            AuditOutcome::Honest => {
                let mut seen = self.store.experience(&record.node);
                seen.vouched(now);
                self.keep_experience(&record.node, &seen);
            }
            AuditOutcome::Differs(_) => self.remember_fault(record, Fault::Cheated),
            AuditOutcome::CouldNotLook { obstacle: AuditObstacle::Withheld, .. }
                if age.0 < AUDIT_SHOWN_MS =>
            {
                self.remember_fault(record, Fault::Withheld);
            }
            AuditOutcome::CouldNotLook { .. } => {}
        }
        Ok(())
    }
}

fn auditor(found: &Found) -> Auditor {
    let Candidate { node, capacity, .. } = &found.candidate;
    let told = capacity.addresses.iter().map(ToString::to_string);
    let mut addresses: Vec<String> = found.addresses.iter().map(ToString::to_string).chain(told).collect();
    addresses.dedup();
    Auditor { node: *node, name: capacity.name.to_string(), addresses }
}

/// The networks that a node's addresses are of: /24, or /56.
fn networks(found: &Found) -> BTreeSet<Vec<u8>> {
    let told = found.candidate.capacity.addresses.iter().filter_map(|text| text.parse::<Multiaddr>().ok());
    let all = found.addresses.iter().cloned().chain(told);
    let network = |addr: Multiaddr| {
        addr.iter().find_map(|part| match part {
            Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
            Protocol::Ip6(ip) => Some(IpAddr::V6(ip)),
            _ => None,
        })
    };
    let prefix = |ip: IpAddr| match ip.to_canonical() {
        IpAddr::V4(ip) => ip.octets()[..3].to_vec(),
        IpAddr::V6(ip) => ip.octets()[..7].to_vec(),
    };
    all.filter_map(network).map(prefix).collect()
}
