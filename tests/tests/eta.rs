//! Times told at admission, by real daemons whose engines sleep, to several clients whose jobs come and are cancelled at
//! times from a fixed seed.
#![allow(clippy::print_stdout)]

use kinoflock_tests::rig::Rig;
use kinoflock_tests::sim::plan::plan;
use kinoflock_tests::sim::report::Report;
use kinoflock_tests::sim::{Scene, run};

/// `cargo test --workspace --test eta -- --nocapture times_told` prints how far each was off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_told_at_admission_hold_for_nine_jobs_in_ten_with_real_processes() {
    // Jobs of 2 to 20 seconds on a node of middling speed, at seven tenths of what the nodes can do.
    let scene = Scene { cancels: 0.1, seed: 5, ..Scene::of(8, 1, 48, 90.0) };
    let mut plan = plan(scene);
    plan.speeds.iter_mut().for_each(|speed| *speed = speed.clamp(0.8e6, 1.25e6));
    let rig = Rig::start(plan).await;
    let report = rig.run().await;
    println!("{}\n{report}", Report::heading());
    let mut errors = report.errors();
    errors.sort_by(f64::total_cmp);
    println!("told/took - 1: {errors:.2?}");
    assert!(report.done() > 0.999, "{report}");
    assert!(report.honest(0.25) >= 0.9, "{report} {errors:.2?}");
}

/// Both in one table, row by row: `cargo test --release --workspace --test eta -- --ignored --nocapture`. Thirty daemons of
/// a dev build ask more of two cores than these have, and that is what would be measured.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes five minutes, in a release build"]
async fn scenes_of_ten_and_thirty_nodes_go_as_in_the_simulator() {
    println!("| | {}", Report::heading().trim_start_matches("| "));
    for (nodes, jobs) in [(10, 100), (30, 300)] {
        // Few artists: each of them is to be connected with every node before its job, on this one machine.
        let scene = Scene { jobs_each: 20, ..Scene::of(nodes, 1, jobs, jobs as f64 * 12.0 / nodes as f64) };
        let simulated = run(scene);
        println!("| simulated {simulated}");
        let rig = Rig::start(plan(scene)).await;
        let real = rig.run().await;
        println!("| real {real}");
        let mut routed: Vec<_> = real.jobs.iter().map(|job| (job.routed * 1000.0) as u32).collect();
        routed.sort_unstable_by(|a, b| b.cmp(a));
        println!("slowest to route, ms: {:?}", &routed[..routed.len() / 20]);
        let agree = |real: f64, simulated: f64| (real / simulated - 1.0).abs() <= 0.25;
        assert!(agree(real.done(), simulated.done()), "{real}");
        assert!(agree(real.over_best, simulated.over_best), "{real}");
        assert!(agree(real.honest(0.25), simulated.honest(0.25)), "{real}");
        for share in [0.5, 0.99] {
            let routed = |report: &Report| report.quantile(share, |job| job.routed);
            assert!(agree(routed(&real), routed(&simulated)), "{share}: {real}");
        }
        let messages = |report: &Report| report.quantile(0.5, |job| job.messages.into());
        assert!(agree(messages(&real), messages(&simulated)), "{real}");
    }
}
