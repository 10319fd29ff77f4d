//! How long the scheduler takes with a full queue: a quote (which plans all of it), and a finished job.
//!
//! `cargo bench -p kinoflock-node --bench scheduler`
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use kinoflock_node::config::PolicyConfig;

#[path = "../tests/scheduler/world.rs"]
mod world;
use world::{World, device, lavish, public, serve, wanted};

/// As many jobs as the default queue holds.
const WAITING: u64 = 256;

fn full() -> World {
    let devices = vec![device("a", &[1]), device("b", &[1])];
    let mut world = World::with(lavish(), PolicyConfig::default(), serve(), devices);
    for key in 0..WAITING + 2 {
        world.submit(public(key, u8::try_from(key % 64).unwrap()), wanted(10)).unwrap();
    }
    world
}

fn scheduler(c: &mut Criterion) {
    let mut world = full();
    let mut key = 10_000;
    c.bench_function("quote with 256 jobs waiting", |b| {
        b.iter(|| {
            key += 1;
            let promise = world.quote(public(key, 200), wanted(10)).unwrap();
            world.scheduler.handle_release(&promise.lease);
        });
    });
    c.bench_function("job done with 256 jobs waiting", |b| {
        b.iter_batched_ref(full, |world| world.finish(0), BatchSize::LargeInput);
    });
}

criterion_group!(benches, scheduler);
criterion_main!(benches);
