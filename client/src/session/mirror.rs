//! A clip whose maker is reached over a relay only: relays carry no clip, so it comes sealed over a public node. Large
//! inputs go to the maker the same way.
//!
//! The maker sees that its requester comes over a relay and puts a sealed copy with a node that both reach. It is asked
//! where, while a direct connection may still come about; whichever is first. Inputs are put with such a node before the
//! order is sent, which says where they lie.

use std::time::{Duration, Instant};

use kinoflock_net::Multiaddr;
use kinoflock_net::discovery::is_global;
use kinoflock_net::limits::RELAYED_BLOB_BYTES;
use kinoflock_net::multiaddr::Protocol;
use kinoflock_net::peer::{is_relayed, node_of};
use kinoflock_net::sealed::seal_file;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::{Bytes, List, Text};
use kinoflock_protocol::custody::{Content, Keep, MirroredInputs, SealedInput};
use kinoflock_protocol::names::NodeAddress;
use kinoflock_protocol::query::QueryAction;
use kinoflock_protocol::rpc::{Request, Response};
use kinoflock_protocol::seal::SealKey;
use kinoflock_protocol::{Envelope, JobId, Millis, NodeId};

use super::find::{Found, unexpected};
use super::{Client, Event, Events, SessionError};
use crate::store::{JobRecord, StoreError};
use crate::ticket::parse_addresses;

/// How long the maker is asked for a mirror.
const MIRROR_WITHIN: Duration = Duration::from_secs(60);
/// Pause between two questions, in which a direct connection may come about.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Time for a direct connection to come about before inputs are put with another node; a place is held meanwhile.
const DIRECT_WITHIN: Duration = Duration::from_secs(5);
/// Nodes that are asked to hold a job's inputs until one does.
const MAX_ASKED: usize = 4;
/// How long a node is to hold inputs, at most: it is told when they are not needed any more.
const INPUTS_LIFE: Millis = Millis(60 * 60 * 1000);
/// How often a node is asked whether it has fetched an input.
const KEEP_TRIES: u32 = 1200;

/// Inputs that are to lie sealed with another node.
#[derive(Clone)]
struct Lending {
    job: JobId,
    /// Who signed the job.
    requester: kinoflock_protocol::RequesterId,
    inputs: Vec<SealedInput>,
}

impl Client {
    /// Puts the large ones of these inputs, sealed, with a node that both sides reach, if the job's node is reached over a
    /// relay only. Nothing if it is not, or if nobody holds them: the job's node then says what it cannot have.
    pub(super) async fn mirror_inputs(
        &self,
        chosen: &Found,
        found: &[Found],
        job: &Envelope,
        inputs: &[(BlobRef, bool)],
    ) -> Result<Option<MirroredInputs>, SessionError> {
        let node = chosen.candidate.node;
        let large: Vec<_> = inputs.iter().filter(|(blob, _)| blob.len > RELAYED_BLOB_BYTES).collect();
        if large.is_empty() || self.net.direct(node, DIRECT_WITHIN).await? {
            return Ok(None);
        }
        let mut sealed = Vec::new();
        for (blob, is_sealed) in large {
            let of = if *is_sealed { *blob } else { self.seal_input(job, *blob).await? };
            sealed.push(SealedInput { input: blob.id, sealed: of });
        }
        self.inputs.serve(sealed.iter().map(|input| input.sealed.id));
        let id = JobId::of(job, &self.network);
        let lending = Lending { job: id, requester: job.signer.into(), inputs: sealed };
        for (holder, addresses) in reached_by_both(chosen, found).into_iter().take(MAX_ASKED) {
            match self.lend(holder, &addresses, &lending).await {
                Ok(()) => {
                    let addresses = addresses.iter().filter_map(|addr| Text::new(addr.to_string()).ok());
                    let holder = NodeAddress { id: holder, addresses: List::first_of(addresses) };
                    return Ok(Some(MirroredInputs { holder, inputs: List::first_of(lending.inputs) }));
                }
                Err(error) => {
                    tracing::debug!(node = %holder.short(), %error, "a node does not hold the job's inputs");
                }
            }
        }
        Ok(None)
    }

    /// The sealed form of an input, in the store.
    async fn seal_input(&self, job: &Envelope, blob: BlobRef) -> Result<BlobRef, SessionError> {
        let (store, key) = (self.store.clone(), SealKey::of_job(job));
        let sealing = tokio::task::spawn_blocking(move || {
            let (from, to) = (store.blob_path(&blob.id), store.fetch_path(&blob.id, true));
            let sealed = seal_file(&key, &blob.id, &from, &to).map_err(StoreError::io("seal", &from))?;
            store.adopt_blob(&sealed.id, &to).map(|_| sealed)
        });
        Ok(sealing.await.expect("invariant: sealing does not panic")?)
    }

    /// Asks a node to hold inputs. Once it has agreed it fetches them from here in the background.
    async fn lend(
        &self,
        holder: NodeId,
        addresses: &[Multiaddr],
        lending: &Lending,
    ) -> Result<(), SessionError> {
        self.net.connect(holder, addresses.to_vec()).await?;
        for index in 0..lending.inputs.len() {
            self.ask_to_keep(holder, lending, index).await?;
        }
        let (client, lending) = (self.clone(), lending.clone());
        tokio::spawn(async move {
            for index in 0..lending.inputs.len() {
                if let Err(error) = client.until_kept(holder, &lending, index).await {
                    tracing::debug!(node = %holder.short(), %error, "a node did not fetch an input");
                }
            }
        });
        Ok(())
    }

    /// Asks again until a node has fetched an input, whose sealed form is of no more use here then.
    async fn until_kept(&self, holder: NodeId, lending: &Lending, index: usize) -> Result<(), SessionError> {
        for _ in 0..KEEP_TRIES {
            if let Some(pause) = self.ask_to_keep(holder, lending, index).await? {
                tokio::time::sleep(pause.into()).await;
                continue;
            }
            let SealedInput { input, sealed } = lending.inputs[index];
            if sealed.id != input {
                self.store.remove_blob(&sealed.id)?;
            }
            break;
        }
        Ok(())
    }

    /// Asks a node to hold one input; gives when to ask again, if it has yet to fetch it.
    async fn ask_to_keep(
        &self,
        holder: NodeId,
        lending: &Lending,
        index: usize,
    ) -> Result<Option<Millis>, SessionError> {
        let keep = Keep {
            job: lending.job,
            requester: lending.requester,
            holder,
            content: Content::Input(u8::try_from(index).unwrap_or(u8::MAX)),
            sealed: lending.inputs[index].sealed,
            statement: Bytes::default(),
            until: crate::now().plus(INPUTS_LIFE),
            issued_at: crate::now(),
        };
        let keep = Envelope::seal(&self.key, &self.network, &keep)?;
        match self.net.request(holder, Request::Keep(keep)).await? {
            Response::Kept { .. } => Ok(None),
            Response::Busy { retry_after } => Ok(Some(retry_after)),
            other => Err(unexpected(holder, "a request to hold an input", other)),
        }
    }

    /// Fetches a clip over a mirror. False where its maker is reached directly, or names no mirror in time.
    pub(super) async fn fetch_mirrored(
        &self,
        record: &JobRecord,
        clip: &BlobRef,
        events: &Events,
    ) -> Result<bool, SessionError> {
        let until = Instant::now() + MIRROR_WITHIN;
        loop {
            if self.net.direct(record.node, LOOK_EVERY).await? {
                return Ok(false);
            }
            for holder in self.mirrors(record).await {
                let addresses = self.addresses_of_mirror(record, &holder);
                let Ok(true) = self.ask_mirror(record, holder, addresses).await else { continue };
                let record = self.store.job(&record.job)?;
                events.tell(Event::Mirrored { node: holder }).await;
                match self.fetch_sealed(&record, clip, events).await {
                    Ok(true) => return Ok(true),
                    Ok(false) => {}
                    Err(error) => {
                        tracing::debug!(node = %holder.short(), %error, "a mirror did not give the clip");
                        self.drop_holder(&record, &holder)?;
                    }
                }
            }
            if Instant::now() >= until {
                return Ok(false);
            }
        }
    }

    /// The nodes that hold sealed copies by the maker's word. To ask makes it put one there.
    async fn mirrors(&self, record: &JobRecord) -> Vec<NodeId> {
        let Ok(query) = self.query(record, QueryAction::Status) else { return Vec::new() };
        match self.net.request(record.node, Request::Status(query)).await {
            Ok(Response::Status(status)) => status.replicas.iter().copied().collect(),
            Ok(_) | Err(_) => Vec::new(),
        }
    }

    /// Where a mirror may be reached: met before, or the relay over which the maker is.
    fn addresses_of_mirror(&self, record: &JobRecord, holder: &NodeId) -> Vec<Multiaddr> {
        let met = self.store.met(&self.network).into_iter().find(|met| met.node == *holder);
        let mut addresses = met.map(|met| parse_addresses(&met.addresses)).unwrap_or_default();
        let relays = parse_addresses(&record.addresses).into_iter().filter_map(|addr| relay_of(&addr));
        addresses.extend(relays.filter(|(node, _)| node == holder).map(|(_, addr)| addr));
        addresses
    }
}

/// Who carries an address over a relay, and where that node is.
fn relay_of(addr: &Multiaddr) -> Option<(NodeId, Multiaddr)> {
    let before: Multiaddr = addr.iter().take_while(|part| *part != Protocol::P2pCircuit).collect();
    is_relayed(addr).then(|| Some((node_of(&before)?, before))).flatten()
}

/// Nodes that both sides reach, as far as is known: the relays over which the chosen node is reached, then others with
/// public addresses.
fn reached_by_both(chosen: &Found, found: &[Found]) -> Vec<(NodeId, Vec<Multiaddr>)> {
    let of = |found: &Found| -> Vec<Multiaddr> {
        let advertised = found.candidate.capacity.addresses.iter().filter_map(|addr| addr.parse().ok());
        found.addresses.iter().cloned().chain(advertised).collect()
    };
    let node = chosen.candidate.node;
    let mut both: Vec<(NodeId, Vec<Multiaddr>)> = Vec::new();
    let mut note = |node: NodeId, addr: Multiaddr| match both.iter_mut().find(|(known, _)| *known == node) {
        Some((_, addresses)) if addresses.contains(&addr) => {}
        Some((_, addresses)) => addresses.push(addr),
        None => both.push((node, vec![addr])),
    };
    of(chosen).iter().filter_map(relay_of).for_each(|(relay, addr)| note(relay, addr));
    for other in found.iter().filter(|other| other.candidate.node != node) {
        let open = of(other).into_iter().filter(|addr| is_global(addr) && !is_relayed(addr));
        open.for_each(|addr| note(other.candidate.node, addr));
    }
    both
}
