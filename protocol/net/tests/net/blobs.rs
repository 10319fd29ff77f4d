//! Blobs: whole, resumed, from several holders, from liars and from holders that stall.

use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use futures::future::join_all;
use kinoflock_net::blobs::MemoryBlobs;
use kinoflock_net::{
    BlobReader, BlobSink, BlobSource, FetchError, FetchOptions, FetchProgress, FileSink, HolderFault,
    MemorySink, NetEvent, NetHandle, Rates,
};
use kinoflock_protocol::BlobId;
use kinoflock_protocol::clip::Outline;
use kinoflock_protocol::limits::CHUNK_BYTES;
use kinoflock_protocol::rpc::Request;
use tokio::sync::watch;

use crate::support::{Over, Peer, bytes, client_of, node, over_both, peer};

over_both! {
    blobs_of_every_length_around_a_chunk_arrive_whole => whole;
    a_broken_fetch_goes_on_where_it_was => resumed;
    several_holders_share_a_fetch => shared;
    a_holder_that_sends_a_wrong_byte_is_dropped_and_the_rest_is_fetched_elsewhere => wrong_byte;
    a_liar_alone_leaves_no_file => liar_alone;
    a_holder_with_another_outline_is_dropped => wrong_outline;
    a_holder_that_stalls_is_dropped_and_the_rest_is_fetched_elsewhere => stalled;
    a_blob_over_the_callers_limit_is_refused_before_it_is_read => oversize;
    a_blob_that_nobody_has_is_told_apart => nobody_has_it;
    a_sink_that_fails_ends_the_fetch => broken_sink;
    both_directions_of_one_connection_at_once_do_not_deadlock => duplex;
    sixty_four_fetches_at_once_and_control_goes_on => many_at_once;
    an_upload_ceiling_is_kept => ceiling;
}

const MIB: usize = CHUNK_BYTES;

async fn holder(over: Over, content: &[u8]) -> Peer {
    let node = node(over).await;
    let blobs = MemoryBlobs::new();
    blobs.insert(content).unwrap();
    node.net.serve_blobs(Arc::new(blobs));
    node
}

async fn fetch(client: &NetHandle, content: &[u8], holders: &[&Peer]) -> Result<Vec<u8>, FetchError> {
    let nodes: Vec<_> = holders.iter().map(|holder| holder.id()).collect();
    let id = BlobId::of(content);
    let (sink, _) = client.fetch_blob(id, &nodes, MemorySink::new(), FetchOptions::default()).await?;
    Ok(sink.into_bytes())
}

async fn whole(over: Over) {
    for len in [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 7] {
        let content = bytes(len, len as u64);
        let node = holder(over, &content).await;
        let client = client_of(&node).await;
        assert_eq!(fetch(&client.net, &content, &[&node]).await.unwrap(), content, "{len} bytes");
    }
}

async fn resumed(over: Over) {
    let content = bytes(4 * MIB + 9, 1);
    let node = holder(over, &content).await;
    let client = client_of(&node).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clip.mp4");
    let mut first = FileSink::new(&path);
    first.begin(&Outline::of(&content).unwrap()).unwrap();
    first.write_chunk(1, &content[MIB..2 * MIB]).unwrap();
    first.write_chunk(3, &content[3 * MIB..4 * MIB]).unwrap();
    drop(first);
    let (told, mut progress) = watch::channel(FetchProgress::default());
    let options = FetchOptions { progress: Some(told), ..FetchOptions::default() };
    let id = BlobId::of(&content);
    let (_, report) = client.net.fetch_blob(id, &[node.id()], FileSink::new(&path), options).await.unwrap();
    assert_eq!((report.len, report.had), (content.len() as u64, 2 * MIB as u64));
    assert_eq!(report.holders[0].bytes, (2 * MIB + 9) as u64, "what was there is not fetched again");
    assert_eq!(fs::read(&path).unwrap(), content);
    assert_eq!(*progress.borrow_and_update(), FetchProgress { len: report.len, done: report.len });
}

async fn shared(over: Over) {
    let content = bytes(24 * MIB, 2);
    let holders = join_all((0..3).map(|_| holder(over, &content))).await;
    let rate = NonZeroU64::new(20 * MIB as u64);
    for holder in &holders {
        holder.net.set_rates(Rates { upload: rate, download: None });
    }
    let client = client_of(&holders[0]).await;
    client.net.dial(holders[1].addr()).await.unwrap();
    client.net.dial(holders[2].addr()).await.unwrap();
    let nodes: Vec<_> = holders.iter().map(Peer::id).collect();
    let sink = MemorySink::new();
    let fetched = client.net.fetch_blob(BlobId::of(&content), &nodes, sink, FetchOptions::default()).await;
    let (sink, report) = fetched.unwrap();
    assert_eq!(sink.into_bytes(), content);
    assert_eq!(report.holders.iter().map(|holder| holder.bytes).sum::<u64>(), content.len() as u64);
    assert!(report.holders.iter().all(|holder| holder.bytes > 0), "{report:?}");
}

/// Serves bytes that differ from what its outline says, or an outline of other bytes, or nothing at all.
#[derive(Debug, Clone)]
struct Liar {
    outline: Outline,
    content: Arc<[u8]>,
    /// While locked in, a read of this chunk does not return.
    stall: Option<(u64, Arc<Gate>)>,
}

#[derive(Debug, Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl BlobSource for Liar {
    fn open(&self, _: &BlobId) -> io::Result<Option<Box<dyn BlobReader>>> {
        Ok(Some(Box::new(self.clone())))
    }
}

impl BlobReader for Liar {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if let Some((chunk, gate)) = &self.stall
            && offset / MIB as u64 == *chunk
        {
            let open = gate.open.lock().unwrap();
            drop(gate.opened.wait_while(open, |open| !*open).unwrap());
        }
        let start = offset as usize;
        buffer.copy_from_slice(&self.content[start..start + buffer.len()]);
        Ok(())
    }
}

fn one_wrong_byte(content: &[u8], at: usize) -> Liar {
    let mut wrong = content.to_vec();
    wrong[at] ^= 1;
    Liar { outline: Outline::of(content).unwrap(), content: wrong.into(), stall: None }
}

async fn wrong_byte(over: Over) {
    let content = bytes(8 * MIB + 3, 3);
    let honest = holder(over, &content).await;
    let liar = node(over).await;
    // Its first byte is wrong in every chunk but the first, so that any second chunk of its shows it.
    let mut wrong = content.clone();
    for chunk in 1..8 {
        wrong[chunk * MIB] ^= 1;
    }
    let outline = Outline::of(&content).unwrap();
    liar.net.serve_blobs(Arc::new(Liar { outline, content: wrong.into(), stall: None }));
    // Slow enough that the liar gets its turn.
    honest.net.set_rates(Rates { upload: NonZeroU64::new(16 * MIB as u64), download: None });
    let client = client_of(&honest).await;
    client.net.dial(liar.addr()).await.unwrap();
    let holders = [liar.id(), honest.id()];
    let id = BlobId::of(&content);
    let fetched = client.net.fetch_blob(id, &holders, MemorySink::new(), FetchOptions::default()).await;
    let (sink, report) = fetched.unwrap();
    assert_eq!(sink.into_bytes(), content);
    let of_liar = report.holders.iter().find(|report| report.node == liar.id()).unwrap();
    let fault = of_liar.fault.as_ref().expect("the liar is dropped");
    assert!(matches!(fault, HolderFault::WrongChunk { .. }) && fault.is_lie(), "got {fault}");
    let of_honest = report.holders.iter().find(|report| report.node == honest.id()).unwrap();
    assert!(of_honest.fault.is_none());
}

async fn liar_alone(over: Over) {
    let content = bytes(3 * MIB, 4);
    let liar = node(over).await;
    liar.net.serve_blobs(Arc::new(one_wrong_byte(&content, 2 * MIB + 5)));
    let client = client_of(&liar).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clip.mp4");
    let sink = FileSink::new(&path);
    let fetched =
        client.net.fetch_blob(BlobId::of(&content), &[liar.id()], sink, FetchOptions::default()).await;
    match fetched.unwrap_err() {
        FetchError::AllFailed { holders, .. } => {
            assert!(matches!(holders[0].fault, Some(HolderFault::WrongChunk { index: 2 })), "{holders:?}");
        }
        other => panic!("got {other}"),
    }
    assert!(!path.exists());
}

async fn wrong_outline(over: Over) {
    let content = bytes(2 * MIB, 5);
    let other = bytes(2 * MIB, 6);
    let liar = node(over).await;
    liar.net.serve_blobs(Arc::new(one_wrong_byte(&other, 0)));
    let client = client_of(&liar).await;
    match fetch(&client.net, &content, &[&liar]).await.unwrap_err() {
        FetchError::AllFailed { holders, .. } => {
            assert!(matches!(holders[0].fault, Some(HolderFault::WrongOutline { .. })), "{holders:?}");
        }
        other => panic!("got {other}"),
    }
}

async fn stalled(over: Over) {
    let content = bytes(8 * MIB, 7);
    let honest = holder(over, &content).await;
    honest.net.set_rates(Rates { upload: NonZeroU64::new(16 * MIB as u64), download: None });
    let wedged = node(over).await;
    let gate = Arc::new(Gate::default());
    let source = Liar {
        outline: Outline::of(&content).unwrap(),
        content: content.clone().into(),
        stall: Some((0, Arc::clone(&gate))),
    };
    wedged.net.serve_blobs(Arc::new(source));
    let client = client_of(&honest).await;
    client.net.dial(wedged.addr()).await.unwrap();
    let options = FetchOptions { stall: Duration::from_secs(1), ..FetchOptions::default() };
    // Alone it fails; beside an honest holder the fetch goes on.
    let id = BlobId::of(&content);
    let alone = client.net.fetch_blob(id, &[wedged.id()], MemorySink::new(), options.clone()).await;
    match alone.unwrap_err() {
        FetchError::AllFailed { holders, .. } => {
            assert!(matches!(holders[0].fault, Some(HolderFault::Stalled { .. })), "{holders:?}");
        }
        other => panic!("got {other}"),
    }
    let holders = [wedged.id(), honest.id()];
    let (sink, _) = client.net.fetch_blob(id, &holders, MemorySink::new(), options).await.unwrap();
    assert_eq!(sink.into_bytes(), content);
    gate.open();
}

#[derive(Debug)]
struct NeverBegun;

impl BlobSink for NeverBegun {
    fn begin(&mut self, _: &Outline) -> io::Result<Vec<u64>> {
        panic!("nothing may reach the sink");
    }
    fn write_chunk(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        panic!("nothing may reach the sink");
    }
    fn finish(&mut self) -> io::Result<()> {
        panic!("nothing may reach the sink");
    }
}

async fn oversize(over: Over) {
    let content = bytes(2 * MIB, 8);
    let node = holder(over, &content).await;
    let client = client_of(&node).await;
    let options = FetchOptions { max_len: MIB as u64, ..FetchOptions::default() };
    let fetched = client.net.fetch_blob(BlobId::of(&content), &[node.id()], NeverBegun, options).await;
    let error = fetched.map(|_| ()).unwrap_err();
    let (limit, given) = (MIB as u64, 2 * MIB as u64);
    assert!(
        matches!(error, FetchError::TooLarge { limit: l, given: g, .. } if (l, g) == (limit, given)),
        "got {error}"
    );
}

async fn nobody_has_it(over: Over) {
    let node = node(over).await;
    let client = client_of(&node).await;
    let missing = bytes(10, 9);
    match fetch(&client.net, &missing, &[&node]).await.unwrap_err() {
        FetchError::AllFailed { holders, .. } => {
            assert!(matches!(holders[0].fault, Some(HolderFault::NotFound)), "{holders:?}");
        }
        other => panic!("got {other}"),
    }
    let error = fetch(&client.net, &missing, &[]).await.unwrap_err();
    assert!(matches!(error, FetchError::NoHolders { .. }), "got {error}");
}

struct FullDisk;

impl BlobSink for FullDisk {
    fn begin(&mut self, _: &Outline) -> io::Result<Vec<u64>> {
        Ok(Vec::new())
    }
    fn write_chunk(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
    fn finish(&mut self) -> io::Result<()> {
        panic!("a broken fetch is not finished");
    }
}

async fn broken_sink(over: Over) {
    let content = bytes(2 * MIB, 10);
    let node = holder(over, &content).await;
    let client = client_of(&node).await;
    let id = BlobId::of(&content);
    let fetched = client.net.fetch_blob(id, &[node.id()], FullDisk, FetchOptions::default()).await;
    match fetched.map(|_| ()).unwrap_err() {
        FetchError::Sink { error, .. } => assert_eq!(error.kind(), io::ErrorKind::StorageFull),
        other => panic!("got {other}"),
    }
}

async fn duplex(over: Over) {
    let (one, two) = (bytes(16 * MIB, 11), bytes(16 * MIB, 12));
    let mut first = holder(over, &one).await;
    let second = holder(over, &two).await;
    second.net.dial(first.addr()).await.unwrap();
    // Who is dialled may hear of the connection later than who dials, and knows no address to dial itself.
    let dialling = second.id();
    first.wait_for(|e| matches!(e, NetEvent::Connected { node, .. } if node == dialling).then_some(())).await;
    let (from_first, from_second) = ([&first], [&second]);
    let (there, back) =
        tokio::join!(fetch(&first.net, &two, &from_second), fetch(&second.net, &one, &from_first));
    assert_eq!(there.unwrap(), two);
    assert_eq!(back.unwrap(), one);
}

async fn many_at_once(over: Over) {
    let content = bytes(MIB + 5, 13);
    let node = holder(over, &content).await;
    let client = client_of(&node).await;
    let id = node.id();
    let holders = [id];
    let fetches = (0..64).map(|_| async {
        let (blob, sink) = (BlobId::of(&content), MemorySink::new());
        let fetched = client.net.fetch_blob(blob, &holders, sink, FetchOptions::default());
        assert_eq!(fetched.await.unwrap().0.into_bytes(), content);
    });
    let Peer { net, events } = node;
    let _answering = Peer { net, events }.acknowledging();
    let asking = async {
        for _ in 0..10 {
            client.net.request(id, Request::Capacity).await.unwrap();
        }
    };
    tokio::join!(join_all(fetches), asking);
}

async fn ceiling(over: Over) {
    let content = bytes(2 * MIB, 14);
    let mut config = crate::support::node_config(over);
    config.rates.upload = NonZeroU64::new(2 * MIB as u64);
    let node = peer(config).await;
    let blobs = MemoryBlobs::new();
    blobs.insert(content.clone()).unwrap();
    node.net.serve_blobs(Arc::new(blobs));
    let client = client_of(&node).await;
    let begun = std::time::Instant::now();
    assert_eq!(fetch(&client.net, &content, &[&node]).await.unwrap(), content);
    // A second's worth, less what the bucket holds at the start.
    assert!(begun.elapsed() >= Duration::from_millis(700), "took only {:?}", begun.elapsed());
}
