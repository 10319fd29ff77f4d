//! The client may be gone and nodes may die: custodians hand the jobs on, sealed copies outlive their makers, and what is to
//! be forgotten is forgotten everywhere.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use kinoflock_client::provenance::{self, Verified};
use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, eventually, said};

const PROMPT: &str = "a yellow star drifts right over a purple field";
/// Custodians that do not wait long.
const QUICK: &str = "[custody]\nafter = \"2 s\"\n";

fn artist(sandbox: &Sandbox) -> Client {
    let client = sandbox.client("artist");
    client.must(["join", &sandbox.nodes[0].ticket()]);
    client
}

fn verified(file: &Path) -> Verified {
    provenance::check(&fs::read(file).unwrap()).unwrap()
}

fn done(node: &Node) -> bool {
    node.runs() && node.status().jobs_done > 0
}

#[test]
fn a_laptop_closed_with_eight_jobs_finds_eight_clips_although_two_nodes_died() {
    let slow = Worker::test(&["--step-ms", "400"]);
    let mut sandbox = Sandbox::swarm(5, |_| slow.clone(), QUICK);
    let client = artist(&sandbox);
    let seeds: Vec<String> = (0..8).map(|seed| seed.to_string()).collect();
    let jobs: Vec<String> = seeds
        .iter()
        .map(|seed| client.must(["generate", PROMPT, "--detach", "--seed", seed, "--steps", "8"]))
        .collect();
    let busy = |sandbox: &Sandbox| {
        (1..5).filter(|place| !sandbox.nodes[*place].status().jobs.is_empty()).collect::<Vec<_>>()
    };
    let victims: Vec<usize> = busy(&sandbox).into_iter().take(2).collect();
    assert_eq!(victims.len(), 2, "the jobs are spread over several nodes");
    let taken: usize = victims.iter().map(|place| sandbox.nodes[*place].status().jobs.len()).sum();
    for place in &victims {
        sandbox.nodes[*place].kill();
    }
    // The laptop is closed. The others finish what was theirs and what was the victims'.
    let finished = || -> u64 {
        let alive = sandbox.nodes.iter().filter(|node| node.runs());
        alive.map(|node| node.status().jobs_done).sum()
    };
    eventually("eight jobs are done by those that live", || (finished() >= 8).then_some(()));
    let made: Vec<Verified> = jobs
        .iter()
        .enumerate()
        .map(|(place, job)| {
            let file = format!("{place}.mp4");
            client.must(["wait", job, "-o", &file]);
            verified(&client.path(&file))
        })
        .collect();
    invariants::one_outcome_each(&made);
    assert_eq!(made.iter().map(|made| made.clip).collect::<BTreeSet<_>>().len(), 8);
    println!("{taken} jobs were taken from the two that died");
}

#[test]
fn a_clip_outlives_its_maker_sealed_with_the_custodians() {
    let mut sandbox = Sandbox::swarm(4, |_| Worker::test(&[]), QUICK);
    let client = artist(&sandbox);
    let job = client.must(["generate", PROMPT, "--detach"]);
    let maker = eventually("somebody made it", || sandbox.nodes.iter().position(done));
    let holds = |node: &Node| node.status().held_bytes > 0;
    eventually("two custodians hold it", || {
        (sandbox.nodes.iter().filter(|node| holds(node)).count() == 2).then_some(())
    });
    sandbox.nodes[maker].kill();
    client.must(["wait", &job, "-o", "clip.mp4"]);
    let made = verified(&client.path("clip.mp4"));
    let receipt = made.receipt.receipt();
    assert_eq!(receipt.node.to_string(), sandbox.nodes[maker].local().node_id.to_string());
    eventually("nobody holds it any more", || {
        sandbox.nodes.iter().filter(|node| node.runs()).all(|node| !holds(node)).then_some(())
    });
}

#[test]
fn volunteers_hold_what_is_shared_and_cannot_see_it() {
    let mut sandbox = Sandbox::swarm(4, |_| Worker::test(&[]), QUICK);
    let client = artist(&sandbox);
    let job = client.must(["generate", PROMPT, "--detach", "--custodians", "0", "--share", "public"]);
    let maker = eventually("somebody made it", || sandbox.nodes.iter().position(done));
    let others: Vec<usize> = (0..4).filter(|place| *place != maker).collect();
    eventually("two volunteers hold it", || {
        let holding = others.iter().filter(|place| sandbox.nodes[**place].status().held_bytes > 0);
        (holding.count() == 2).then_some(())
    });
    sandbox.nodes[maker].kill();
    client.must(["wait", &job, "-o", "clip.mp4", "--bare"]);
    let clip = fs::read(client.path("clip.mp4")).unwrap();
    for place in others {
        for file in files_under(&sandbox.nodes[place].path("state")) {
            let bytes = fs::read(&file).unwrap();
            let seen = bytes.windows(64).any(|window| window == &clip[clip.len() - 64..]);
            assert!(!seen, "{} shows the clip", file.display());
        }
        assert_eq!(invariants::found_in(&sandbox.nodes[place], PROMPT), Vec::<String>::new());
    }
}

#[test]
fn what_its_artist_forgets_is_gone_everywhere_but_for_the_receipt() {
    let sandbox = Sandbox::swarm(3, |_| Worker::test(&[]), QUICK);
    let client = artist(&sandbox);
    client.must(["generate", PROMPT, "-o", "clip.mp4", "--share", "public"]);
    let made = verified(&client.path("clip.mp4"));
    let output = client.run(["forget", &made.clip.to_string()]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("has forgotten it"), "{}", said(&output));
    assert!(client.must(["ls"]).is_empty(), "{}", client.must(["ls"]));
    for node in &sandbox.nodes {
        eventually("no clip and no sealed copy is left", || {
            let status = node.status();
            (status.clip_bytes == 0 && status.held_bytes == 0 && status.watched_jobs == 0).then_some(())
        });
    }
}

#[test]
fn only_the_requester_hears_what_is_held_and_makes_it_go() {
    let mut sandbox = Sandbox::swarm(3, |_| Worker::test(&[]), QUICK);
    let client = artist(&sandbox);
    client.must(["generate", PROMPT, "-o", "clip.mp4"]);
    let stranger = sandbox.client("stranger");
    stranger.must(["join", &sandbox.nodes[0].ticket()]);
    let jobs = client.path(".local/share/kinoflock/client/jobs");
    let theirs = stranger.path(".local/share/kinoflock/client/jobs");
    stranger.run(["ls"]);
    fs::create_dir_all(&theirs).unwrap();
    for entry in fs::read_dir(jobs).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), theirs.join(entry.file_name())).unwrap();
    }
    let job = fs::read_dir(&theirs).unwrap().next().unwrap().unwrap().path();
    let job = job.file_stem().unwrap().to_str().unwrap().to_owned();
    let maker = sandbox.nodes.iter().position(done).unwrap();
    let output = stranger.run(["forget", &job]);
    assert!(said(&output).contains("holds nothing of it for your key"), "{}", said(&output));
    assert!(!said(&output).contains("has forgotten it"), "{}", said(&output));
    assert!(sandbox.nodes[maker].status().clip_bytes > 0, "the clip is still there");
    sandbox.nodes[maker].kill();
}

fn files_under(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() { files.extend(files_under(&path)) } else { files.push(path) }
    }
    files
}
