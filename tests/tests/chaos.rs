//! Many jobs through nodes that are killed and started again, stopped, and cut off at random: every job ends with one
//! verified clip, none is lost, and none is accepted twice.
//!
//! A node is cut off by rules of nftables that drop what comes to its ports and from them. Where the system lets nobody set
//! such rules, it is stopped instead, and the test says how often it was which.
//!
//! `KINOFLOCK_CHAOS=100x8` runs 100 jobs through 8 nodes; `KINOFLOCK_CHAOS_SEED` repeats a run's chaos.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use kinoflock_client::local::LocalNode;
use kinoflock_client::provenance::{self, Verified};
use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, said, send};
use rustix::process::Signal;

const PROMPT: &str = "a white triangle drifts down over a red field";
/// Jobs that are under way at once.
const AT_ONCE: usize = 6;
/// How often is looked whether a node has told its ports.
const LOOK: Duration = Duration::from_millis(50);
/// Custodians that do not wait long.
const QUICK: &str = "[custody]\nafter = \"5 s\"\n";

/// Numbers from a seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn draw(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % below
    }
}

/// What can be done to a node.
enum Blow {
    Kill,
    CutOff,
    Stop,
}

/// What was done to nodes.
#[derive(Debug, Default)]
struct Blows {
    killed: usize,
    stopped: usize,
    cut_off: usize,
}

/// Rules that drop all that comes to a node's ports or from them, until this is dropped.
struct Cut {
    table: String,
}

impl Cut {
    /// None where the system does not let us.
    fn off(node: &Node) -> Option<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        if !Self::is_allowed() {
            return None;
        }
        let mut waited = Duration::ZERO;
        // A node that has only just started may not have told its ports.
        let ports = loop {
            let local = LocalNode::read(&node.path("run"));
            let addresses = local.map(|local| local.addresses).unwrap_or_default();
            let ports: BTreeSet<_> =
                addresses.iter().filter_map(|address| Some(address.split('/').nth(4)?.to_owned())).collect();
            if !ports.is_empty() {
                break ports.into_iter().collect::<Vec<_>>();
            }
            if waited > Duration::from_secs(5) {
                return None;
            }
            thread::sleep(LOOK);
            waited += LOOK;
        };
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let table = format!("kinoflock_chaos_{}_{number}", std::process::id());
        let of = |what: &str| format!("{what} {{ {} }} drop\n", ports.join(", "));
        let drops: String = ["udp dport", "udp sport", "tcp dport", "tcp sport"].map(of).concat();
        let rules = format!(
            "table inet {table} {{\nchain cut {{\ntype filter hook input priority 0;\n{drops}}}\n}}\n"
        );
        let mut setting = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        setting.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
        assert!(setting.wait().unwrap().success(), "these rules are wrong:\n{rules}");
        Some(Self { table })
    }

    /// Whether the system lets us set rules at all.
    fn is_allowed() -> bool {
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        *ALLOWED.get_or_init(|| {
            let table = format!("kinoflock_chaos_{}", std::process::id());
            let done = |what: &str| {
                let mut nft = Command::new("nft");
                nft.args([what, "table", "inet", &table]).stderr(Stdio::null());
                nft.status().is_ok_and(|status| status.success())
            };
            done("add") && done("delete")
        })
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        // Where it could be set it can be taken away.
        let _ = Command::new("nft").args(["delete", "table", "inet", &self.table]).status();
    }
}

/// Hurts one node at a time until it is told to stop; the first one stays well, for somebody must know the way.
fn hurt(nodes: &Mutex<Vec<Node>>, seed: u64, over: &AtomicBool) -> Blows {
    let mut dice = Dice(seed);
    let mut blows = Blows::default();
    // Of three blows in turn each kind is one.
    let mut bag = Vec::new();
    while !over.load(Ordering::SeqCst) {
        let place = 1 + dice.draw(nodes.lock().unwrap().len() as u64 - 1) as usize;
        let pause = Duration::from_millis(500 + dice.draw(2500));
        if bag.is_empty() {
            bag = vec![Blow::Kill, Blow::CutOff, Blow::Stop];
        }
        let cut = match bag.swap_remove(dice.draw(bag.len() as u64) as usize) {
            Blow::Kill => {
                nodes.lock().unwrap()[place].kill();
                wait(pause, over);
                nodes.lock().unwrap()[place].start();
                blows.killed += 1;
                continue;
            }
            Blow::CutOff => Cut::off(&nodes.lock().unwrap()[place]),
            Blow::Stop => None,
        };
        if cut.is_some() {
            wait(pause * 4, over);
            blows.cut_off += 1;
        } else {
            let pid = nodes.lock().unwrap()[place].pid();
            send(pid, Signal::STOP);
            wait(pause * 4, over);
            send(pid, Signal::CONT);
            blows.stopped += 1;
        }
        wait(Duration::from_millis(dice.draw(1500)), over);
    }
    blows
}

/// The length of a blow is the chaos itself; nothing is waited for.
fn wait(span: Duration, over: &AtomicBool) {
    let until = Instant::now() + span;
    while Instant::now() < until && !over.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(20));
    }
}

fn make(client: &Client, number: usize) -> Verified {
    let (seed, file) = (number.to_string(), format!("{number}.mp4"));
    let output = client.run(["generate", PROMPT, "--seed", &seed, "--steps", "6", "-o", &file]);
    let words = said(&output);
    // A client that gave up, since nobody could take the job just then, is told to go on.
    if !output.status.success() {
        let job = client.must(["ps"]);
        panic!("job {number} did not end with a clip: {words}\n{job}");
    }
    provenance::check(&fs::read(client.path(&file)).unwrap()).unwrap()
}

fn survives(jobs: usize, nodes: usize, worker: impl Fn(usize) -> Worker, seed: u64) {
    let mut sandbox = Sandbox::swarm(nodes, worker, QUICK);
    let client = sandbox.client("artist");
    client.must(["join", &sandbox.nodes[0].ticket()]);
    let hurting = Arc::new(Mutex::new(std::mem::take(&mut sandbox.nodes)));
    let over = Arc::new(AtomicBool::new(false));
    let chaos = {
        let (nodes, over) = (Arc::clone(&hurting), Arc::clone(&over));
        thread::spawn(move || hurt(&nodes, seed, &over))
    };
    let next = AtomicUsize::new(0);
    let made = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= jobs {
                        return;
                    }
                    let clip = make(&client, number);
                    made.lock().unwrap().push(clip);
                }
            });
        }
    });
    over.store(true, Ordering::SeqCst);
    let blows = chaos.join().unwrap();
    sandbox.nodes = std::mem::take(&mut *hurting.lock().unwrap());
    let made = made.into_inner().unwrap();
    assert_eq!(made.len(), jobs);
    invariants::one_outcome_each(&made);
    assert_eq!(made.iter().map(|clip| clip.clip).collect::<BTreeSet<_>>().len(), jobs, "every seed its clip");
    let makers: BTreeSet<_> = made.iter().map(|clip| clip.receipt.receipt().node).collect();
    println!("{jobs} clips from {} of {nodes} nodes under {blows:?}, seed {seed}", makers.len());
}

fn seed() -> u64 {
    std::env::var("KINOFLOCK_CHAOS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7)
}

#[test]
fn every_job_ends_with_one_clip_while_nodes_are_killed_stopped_and_started() {
    let size = std::env::var("KINOFLOCK_CHAOS").unwrap_or_else(|_| "18x4".to_owned());
    let (jobs, nodes) = size.split_once('x').unwrap();
    let slow = Worker::test(&["--step-ms", "150"]);
    survives(jobs.parse().unwrap(), nodes.parse().unwrap(), |_| slow.clone(), seed());
}

#[test]
fn the_same_with_the_bundled_model() {
    survives(6, 3, |_| Worker::Real, seed() + 1);
}
