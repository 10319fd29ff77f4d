//! Every bound of the network layer, with its unit and what happens when it is reached.

use std::time::Duration;

use kinoflock_protocol::Millis;

/// Commands waiting for the driver. When full, the caller of a handle's method waits.
pub const COMMANDS: usize = 64;
/// Events waiting for the owner. When full, news is dropped, and whoever asks us something hears `Busy`.
pub const EVENTS: usize = 256;

/// Inbound control requests being answered, all peers together. Above it a request hears `Busy`.
pub const INBOUND_REQUESTS: usize = 256;
/// Inbound control requests being answered for one peer. Above it a request hears `Busy`.
pub const INBOUND_REQUESTS_PER_PEER: usize = 32;
/// Outbound control requests waiting for an answer. Above it the caller gets `TooManyRequests`.
pub const OUTBOUND_REQUESTS: usize = 512;
/// Outbound control requests in flight to one peer. Further ones wait inside the handle.
pub const OUTBOUND_REQUESTS_PER_PEER: usize = 16;
/// Control streams of one connection inside request-response; above it that layer drops streams.
pub const RPC_STREAMS_PER_CONNECTION: usize = 512;
/// Longest time that a control request may take, reading, answering and writing included.
pub const RPC_TIMEOUT: Duration = Duration::from_secs(30);
/// Time a control request is given when its caller names none.
pub const RPC_DEADLINE: Duration = Duration::from_secs(10);

/// Streams that we hold open to one peer at once. Further opens wait inside the handle.
pub const OUTBOUND_STREAMS_PER_PEER: usize = 256;
/// Streams to one peer that are being negotiated at once. Further opens wait in the handler's queue.
pub const NEGOTIATING_STREAMS: usize = 32;
/// Opens waiting in one connection's handler. Above it an open fails with `TooManyStreams`.
pub const QUEUED_OPENS: usize = 1024;
/// Streams that one peer may hold open to us. Higher than what we open ourselves, because the far side
/// learns later than we do that a stream has ended. Above it a stream hears `Busy`.
pub const INBOUND_STREAMS_PER_PEER: usize = 320;
/// Inbound streams, all peers together. Above it a stream hears `Busy`.
pub const INBOUND_STREAMS: usize = 4096;
/// `Busy` answers being written on one connection. Above it the stream is reset without a word.
pub const BUSY_ANSWERS: usize = 64;
/// Time to write a `Busy` answer.
pub const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the opener's first frame, and for the owner's verdict on it.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a whole open: waiting for a slot, negotiation, hello, answer.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Tries to open a stream that ended before its answer came.
pub const OPEN_TRIES: u32 = 3;
/// When we are at a limit of our own, we ask others to come back after this.
pub const RETRY_AFTER: Millis = Millis(2_000);
/// Time within which a frame must be written once begun; a peer that reads slower loses the stream.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(20);

/// Progress events waiting in a sink for the network. When full, the sender waits.
pub const PROGRESS_QUEUE: usize = 32;
/// A silent progress stream says "still here" this often.
pub const HEARTBEAT: Duration = Duration::from_secs(15);
/// A progress stream that says nothing for this long is given up.
pub const PROGRESS_IDLE: Duration = Duration::from_secs(60);

/// Streams that yamux lets one connection hold, both directions; at this number yamux ends the connection.
/// Higher than all that both sides open by their own limits.
pub const MUXER_STREAMS: usize = 1024;
/// Streams that are negotiated at once per connection, inbound.
pub const NEGOTIATING_INBOUND: usize = 128;

/// Bytes of a blob moved per read, write and timeout.
pub const BLOB_PIECE: usize = 64 * 1024;
/// Chunks that a fetch asks of one holder at a time, at most.
pub const BLOB_RUN: u64 = 8;
/// Runs of chunks that a fetch keeps in flight at one holder.
pub const BLOB_PIPELINE: usize = 2;
/// Holders that one fetch draws on at once; further ones are taken when one falls away.
pub const BLOB_HOLDERS: usize = 8;
/// Disk reads for peers running at once on the blocking pool. Further ones wait.
pub const BLOB_READS: usize = 16;
/// A served stream on which nothing is asked for this long is closed.
pub const BLOB_IDLE: Duration = Duration::from_secs(60);
/// A holder that sends nothing for this long is dropped, unless the caller says otherwise.
pub const BLOB_STALL: Duration = Duration::from_secs(20);
/// A holder that needs longer for one chunk is dropped, unless the caller says otherwise.
pub const BLOB_CHUNK_TIMEOUT: Duration = Duration::from_secs(120);

/// Largest gossiped advert, bytes.
pub const ADVERT_BYTES: usize = kinoflock_protocol::limits::MAX_ADVERT;
/// Adverts whose verdict is awaited. Above it an advert is ignored (neither forwarded nor held against
/// its sender).
pub const ADVERTS: usize = 128;

/// Peers whose identify record and addresses are remembered; the oldest goes first.
pub const PEERS: usize = 1024;
/// Addresses remembered per peer.
pub const ADDRESSES_PER_PEER: usize = 16;
/// Protocol names remembered per peer.
pub const PROTOCOLS_PER_PEER: usize = 64;
/// Callers waiting for one connection or one identify record. Above it the caller gets `TooManyRequests`.
pub const WAITERS: usize = 1024;
/// Keys that we tell the DHT to have; it is the store's own bound.
pub const PROVIDED_KEYS: usize = 1024;
/// How often the DHT is told again what we have.
pub const PROVIDED_EVERY: Duration = Duration::from_secs(20 * 60);
/// How long the DHT remembers it.
pub const PROVIDED_FOR: Duration = Duration::from_secs(3600);
/// Providers of one key that are asked for.
pub const PROVIDERS: usize = 8;
/// Time for the DHT to name providers.
pub const SEEK_TIMEOUT: Duration = Duration::from_secs(5);
/// Time to wait for a peer's identify record when a negotiation failed, to tell which version it speaks.
pub const IDENTIFY_WAIT: Duration = Duration::from_secs(5);
/// Time for a dial.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(20);

/// Names that are asked for at most to look up one list of nodes in DNS, lists within it included.
pub const DNSADDR_LOOKUPS: usize = 8;
/// Addresses that are taken from one list; further ones are passed over.
pub const DNSADDR_ADDRESSES: usize = 32;
/// Time to look up one list.
pub const DNSADDR_WAIT: Duration = Duration::from_secs(5);

/// Bytes that our relays carry each way over one circuit: hours of control and progress, no clip.
pub const CIRCUIT_BYTES: u64 = 4 * 1024 * 1024;
/// Life of a circuit over our relays.
pub const CIRCUIT_TIME: Duration = Duration::from_secs(3600);
/// Circuits over this process at once, all peers together. Above it a circuit is denied.
pub const CIRCUITS: usize = 256;
/// Circuits that one peer may open over this process. Above it a circuit is denied.
pub const CIRCUITS_PER_PEER: usize = 8;
/// Places at this relay, all peers together. Above it a place is denied.
pub const RESERVATIONS: usize = 256;
/// Places of one peer at this relay. Above it a place is denied.
pub const RESERVATIONS_PER_PEER: usize = 2;
/// Life of a place at a relay; its owner renews it before.
pub const RESERVATION_TIME: Duration = Duration::from_secs(3600);
/// Own addresses that are listened on; what a relay names beyond is passed over.
pub const LISTEN_ADDRESSES: usize = 128;
/// Nodes that a node keeps connections with; with fewer, known ones are dialed.
pub const COMPANY: usize = 8;
/// Nodes and addresses that are dialed to stay in company; beyond, those that failed most are forgotten.
pub const WAYS: usize = 128;
/// How often a node looks whether it has company enough; also the first pause before one that failed is dialed again.
pub const REJOIN_EVERY: Duration = Duration::from_secs(1);
/// Longest pause before a node that the owner named is dialed again.
pub const REJOIN_PAUSE_NAMED: Duration = Duration::from_secs(5);
/// Longest pause before any other node is dialed again.
pub const REJOIN_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Nodes dialed at one look.
pub const REJOIN_AT_ONCE: usize = 8;
/// Nodes that are told when the known ones are asked for; those met most recently come first.
pub const KNOWN_NODES: usize = 64;
/// Relays at which this process keeps a place while nobody reaches it directly.
pub const RELAYS_HELD: usize = 2;
/// Relays that are remembered; further ones are passed over.
pub const RELAYS_KNOWN: usize = 64;
/// Pause before a relay that failed is asked again; doubled with each failure.
pub const RELAY_PAUSE: Duration = Duration::from_secs(1);
/// Longest such pause.
pub const RELAY_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Own addresses whose test is remembered; further ones are passed over.
pub const TESTED_ADDRESSES: usize = 64;
/// Bytes of a blob that may come over a relay. A greater one waits for a direct connection.
pub const RELAYED_BLOB_BYTES: u64 = 256 * 1024;
/// How often a direct connection is tried within the time to wait for it.
pub const DIRECT_ATTEMPTS: u32 = 3;
/// Time to wait for a direct connection before a blob is given up.
pub const DIRECT_WAIT: Duration = Duration::from_secs(15);

/// Connections from others, established.
pub const CONNECTIONS_IN: u32 = 256;
/// Connections to others, established.
pub const CONNECTIONS_OUT: u32 = 64;
/// Connections with one peer.
pub const CONNECTIONS_PER_PEER: u32 = 4;
/// Connections from others, handshake not finished.
pub const CONNECTIONS_PENDING_IN: u32 = 256;
/// Of these, of one network (/24, /56). Further ones are hung up on.
pub const CONNECTIONS_PENDING_PER_NETWORK: u32 = 48;
/// Connections to others, handshake not finished.
pub const CONNECTIONS_PENDING_OUT: u32 = 64;
/// Physical memory of the process above which new connections are refused, bytes.
pub const MEMORY_BYTES: usize = 8 * 1024 * 1024 * 1024;
/// A connection without a stream is closed after this.
pub const IDLE_CONNECTION: Duration = Duration::from_secs(60);
/// QUIC gives up a silent connection after this. A process that was killed says no goodbye over UDP: until then its
/// peers take it for connected, and their requests may go to the dead connection though it is back on a new one.
pub const QUIC_IDLE: Duration = Duration::from_secs(8);
/// QUIC says "still here" this often.
pub const QUIC_KEEP_ALIVE: Duration = Duration::from_secs(2);
