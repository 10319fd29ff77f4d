//! What the protocol costs: `cargo bench -p kinoflock-protocol`.
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kinoflock_protocol::clip::{Outline, chaining_values, merge, verify_chunk};
use kinoflock_protocol::limits::{CHUNK_BYTES, MAX_ENVELOPE_BODY};
use kinoflock_protocol::*;
use std::hint::black_box;

fn job() -> JobSpec {
    let shape = JobShape { frames: 97, width: 704, height: 480, steps: 40, guided: true };
    let prompt = Prompt::new("a red circle drifts left over a blue field ".repeat(6)).unwrap();
    JobSpec::generate(ModelId::from_bytes([5; 32]), prompt, Nonce::from_bytes([6; 16]), UnixMillis(1), shape)
}

fn envelopes(c: &mut Criterion) {
    let (keypair, network, job) = (Keypair::from_seed(&[1; 32]), NetworkId::named("bench"), job());
    let envelope = Envelope::seal(&keypair, &network, &job).unwrap();
    let bytes = envelope.encode();
    c.bench_function("sign a job", |b| {
        b.iter(|| Envelope::seal(&keypair, &network, black_box(&job)).unwrap())
    });
    c.bench_function("verify a job strictly", |b| {
        b.iter(|| black_box(&envelope).verify::<JobSpec>(&network).unwrap());
    });
    c.bench_function("decode, verify and read a job", |b| {
        b.iter(|| Envelope::decode(black_box(&bytes)).unwrap().open::<JobSpec>(&network).unwrap());
    });
}

fn coding(c: &mut Criterion) {
    let job = job();
    let bytes = codec::encode(&job);
    c.bench_function("encode a job", |b| b.iter(|| codec::encode(black_box(&job))));
    c.bench_function("decode a job", |b| {
        b.iter(|| codec::decode::<JobSpec>(black_box(&bytes), MAX_ENVELOPE_BODY).unwrap());
    });
    let model = WorkModel::ltx_13b();
    c.bench_function("work of a job", |b| b.iter(|| work::work(black_box(&model), &job.shape())));
}

fn blobs(c: &mut Criterion) {
    let bytes = vec![7; 8 * CHUNK_BYTES];
    let outline = Outline::of(&bytes).unwrap();
    let mut group = c.benchmark_group("blob of 8 MiB");
    group.throughput(Throughput::Bytes(bytes.len() as u64)).sample_size(20);
    group.bench_function("chaining values", |b| b.iter(|| chaining_values(black_box(&bytes)).unwrap()));
    group.throughput(Throughput::Bytes(CHUNK_BYTES as u64));
    group.bench_function("verify one chunk", |b| {
        b.iter(|| {
            verify_chunk(3, outline.len, &bytes[3 * CHUNK_BYTES..4 * CHUNK_BYTES], &outline.values[3])
                .unwrap()
        });
    });
    group.finish();
    c.bench_function("merge 8 chaining values", |b| {
        b.iter(|| merge(outline.len, black_box(&outline.values)).unwrap())
    });
}

criterion_group!(benches, envelopes, coding, blobs);
criterion_main!(benches);
