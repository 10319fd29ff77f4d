//! Every size, count and time bound of the protocol, with its unit.
//!
//! These bound what a peer can make another allocate or wait for. They are no judgement on what an artist may ask:
//! operators set their own limits, and a refusal names them.

/// The protocol version that this release speaks, the first byte of every control, progress and blob frame.
pub const PROTOCOL_VERSION: u8 = 1;
/// Every protocol version that this release can read.
pub const SPOKEN_VERSIONS: &[u8] = &[PROTOCOL_VERSION];

/// Greatest body of any signed envelope, in bytes.
pub const MAX_ENVELOPE_BODY: usize = 48 * 1024;
/// Bytes that an envelope adds to its body.
pub const ENVELOPE_OVERHEAD: usize = 1 + 2 + 8 + 32 + 8 + 64;
/// Greatest encoded envelope, in bytes.
pub const MAX_ENVELOPE: usize = MAX_ENVELOPE_BODY + ENVELOPE_OVERHEAD;
/// Greatest encoded capacity advert with its envelope: what gossip carries, in bytes.
pub const MAX_ADVERT: usize = 8 * 1024;

/// Greatest control frame (a request or an answer), in bytes.
pub const MAX_CONTROL_FRAME: usize = 256 * 1024;
/// Greatest progress frame, in bytes: a preview and its envelope.
pub const MAX_PROGRESS_FRAME: usize = 128 * 1024;
/// Greatest blob frame, in bytes: one chunk and its head.
pub const MAX_BLOB_FRAME: usize = CHUNK_BYTES + 64;
/// Greatest outline frame, in bytes: the chaining values of the greatest blob.
pub const MAX_OUTLINE_FRAME: usize = MAX_CHUNKS * 32 + 64;
/// Greatest frame that opens a stream, in bytes.
pub const MAX_OPEN_FRAME: usize = 4 * 1024;

/// Length of a blob chunk, in bytes: what is verified before it is written.
pub const CHUNK_BYTES: usize = 1024 * 1024;
/// Most chunks of one blob (64 GiB).
pub const MAX_CHUNKS: usize = 64 * 1024;
/// Greatest blob, in bytes.
pub const MAX_BLOB_BYTES: u64 = CHUNK_BYTES as u64 * MAX_CHUNKS as u64;
/// Greatest preview picture, in bytes of PNG.
pub const MAX_PREVIEW: usize = 64 * 1024;

/// Greatest prompt and greatest negative prompt, in bytes of UTF-8.
pub const MAX_PROMPT: usize = 8 * 1024;
/// Greatest short text (names, codes, licence names), in bytes of UTF-8.
pub const MAX_NAME: usize = 128;
/// Greatest line of text for people, in bytes of UTF-8.
pub const MAX_LINE: usize = 512;
/// Greatest paragraph of text for people, in bytes of UTF-8.
pub const MAX_PARAGRAPH: usize = 4 * 1024;
/// Greatest multiaddress in text form, in bytes.
pub const MAX_ADDRESS: usize = 256;

/// Most adapters of one job.
pub const MAX_ADAPTERS: usize = 16;
/// Most keyframes of one job.
pub const MAX_KEYFRAMES: usize = 64;
/// Most parent clips of one job.
pub const MAX_PARENTS: usize = 32;
/// Most custodians of one job.
pub const MAX_CUSTODIANS: usize = 8;
/// Greatest sealed statement (a receipt or a checkpoint in its envelope), in bytes.
pub const MAX_STATEMENT: usize = 20 * 1024;
/// Most sealed blobs that one node holds for one job.
pub const MAX_HELD: usize = 8;
/// Most lists that one node or client subscribes to.
pub const MAX_LISTS: usize = 16;
/// Most nodes on a published list.
pub const MAX_LISTED_NODES: usize = 64;
/// Most models on a published list.
pub const MAX_LISTED_MODELS: usize = 64;
/// Most extra operations of one job.
pub const MAX_OPS: usize = 32;
/// Most numbers in one operation's list.
pub const MAX_OP_NUMBERS: usize = 256;
/// Greatest membership proof, in bytes.
pub const MAX_MEMBERSHIP: usize = 8 * 1024;
/// Most inputs that a receipt lists.
pub const MAX_INPUTS: usize = MAX_KEYFRAMES + MAX_ADAPTERS + 8;
/// Most segments of a resumed job.
pub const MAX_SEGMENTS: usize = 32;

/// Most models in one advert.
pub const MAX_OFFERS: usize = 24;
/// Most devices in one advert.
pub const MAX_DEVICES: usize = 16;
/// Most collectives that one node or advert names.
pub const MAX_COLLECTIVES: usize = 8;
/// Most addresses of one node.
pub const MAX_ADDRESSES: usize = 8;
/// Most nodes in one answer or ticket.
pub const MAX_NODES: usize = 16;
/// Most protocol versions in one advert.
pub const MAX_VERSIONS: usize = 8;

/// Most files of one model.
pub const MAX_MODEL_FILES: usize = 256;
/// Greatest encoded model manifest, in bytes.
pub const MAX_MANIFEST: usize = 64 * 1024;
/// Most cards in one answer.
pub const MAX_CARDS: usize = 4;
/// Most authors, shares, sources or upstreams on one card.
pub const MAX_PARTIES: usize = 32;
/// Most values that a fingerprint samples.
pub const MAX_SAMPLES: usize = 256;
/// Most cards that a receipt names.
pub const MAX_RECEIPT_CARDS: usize = MAX_ADAPTERS + 1;

/// How far two clocks may differ before a statement is refused, in milliseconds (5 minutes).
pub const MAX_CLOCK_SKEW_MS: u64 = 5 * 60 * 1000;
/// How long an advert lives from its arrival, in milliseconds.
pub const ADVERT_LIFE_MS: u64 = 60 * 1000;
/// How long an advert may live from its issue, whatever its arrival, in milliseconds (6 minutes).
pub const ADVERT_LIFE_FROM_ISSUE_MS: u64 = 6 * 60 * 1000;
/// How long an expired advert's sequence number is remembered, in milliseconds.
pub const ADVERT_MEMORY_MS: u64 = 10 * 60 * 1000;
/// How long a lease holds a place, in milliseconds.
pub const LEASE_MS: u64 = 15 * 1000;
/// Longest life that a quote may claim, in milliseconds.
pub const MAX_LEASE_MS: u64 = 60 * 1000;
/// How long an order may be on its way, in milliseconds.
pub const ORDER_LIFE_MS: u64 = 60 * 1000;
/// How long a signed job query is good for, in milliseconds.
pub const QUERY_LIFE_MS: u64 = 5 * 60 * 1000;
/// How old a job without a deadline may become, in milliseconds (7 days).
pub const JOB_LIFE_MS: u64 = 7 * 24 * 60 * 60 * 1000;

/// How long a node that commits to its steps shows them at least, in milliseconds (1 hour): one that cannot within this time
/// did not keep its word.
pub const AUDIT_SHOWN_MS: u64 = 60 * 60 * 1000;
/// How long a grant for an audit may hold at most, in milliseconds (1 day).
pub const AUDIT_GRANT_LIFE_MS: u64 = 24 * 60 * 60 * 1000;

/// A whole in basis points.
pub const WHOLE_BPS: u16 = 10_000;
