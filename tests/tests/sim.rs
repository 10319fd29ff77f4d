//! What holds of many nodes and clients, in virtual time.
#![allow(clippy::print_stdout)]

use kinoflock_tests::sim::report::Report;
use kinoflock_tests::sim::{Scene, run};

/// Bytes that a client may spend on routing one job.
const CLIENT_BYTES: f64 = 64.0 * 1024.0;
/// Round trips one after another that it may take: who is there, who takes it, the order.
const TRIPS: f64 = 3.0;

fn shown(what: &str, reports: &[Report]) {
    println!("{what}\n{}", Report::heading());
    reports.iter().for_each(|report| println!("{report}"));
}

#[test]
fn two_hundred_clients_at_once_spread_over_the_nodes() {
    let herd = |seed| Scene { seed, ..Scene::of(20, 1, 200, 0.0) };
    let reports: Vec<_> = (1..=5).map(|seed| run(herd(seed))).collect();
    shown("200 clients at once", &reports);
    let wrong: Vec<_> = (1..=5).map(|seed| run(Scene { speed_error: 0.15, ..herd(seed) })).collect();
    shown("200 clients at once, speeds measured within 15 %", &wrong);
    for (reports, limit) in [(reports, 1.3), (wrong, 1.4)] {
        for report in reports {
            assert!(report.done() > 0.999, "{report}");
            assert!(report.over_best <= limit, "{report}");
        }
    }
}

#[test]
fn times_told_at_admission_hold_for_nine_jobs_in_ten() {
    let scene = |seed| Scene { cancels: 0.1, seed, ..Scene::of(10, 1, 400, 450.0) };
    let reports: Vec<_> = (1..=5).map(|seed| run(scene(seed))).collect();
    shown("times told", &reports);
    for report in reports {
        let mut bins = [0; 11];
        report.errors().iter().for_each(|e| bins[((e * 10.0 + 5.5).clamp(0.0, 10.0)) as usize] += 1);
        println!("told/took - 1 from -50 % to +50 % by tenths: {bins:?}");
        assert!(report.honest(0.25) >= 0.9, "{report}");
    }
}

#[test]
fn networks_of_all_sizes_route_their_jobs() {
    let sizes = [(10, 1, 100), (30, 1, 300), (100, 2, 500), (1_000, 8, 1_000)];
    let quiet = |&(nodes, models, jobs): &(usize, usize, usize)| {
        Scene::of(nodes, models, jobs, jobs as f64 * 12.0 / nodes as f64)
    };
    let reports: Vec<_> = sizes.iter().map(|size| run(quiet(size))).collect();
    shown("quiet", &reports);
    let rough: Vec<_> = sizes.iter().map(|size| run(quiet(size).rough())).collect();
    shown("loss 2 %, a tenth of the nodes leave, a tenth lie, a partition", &rough);
    reports.iter().for_each(check);
    for report in &rough {
        assert!(report.done() > 0.99, "{report}");
        assert!(report.honest_of_honest(0.25) >= 0.9, "{report}");
    }
}

#[test]
#[ignore = "half a minute in a build without optimisation"]
fn ten_thousand_nodes_cost_a_client_no_more_than_ten() {
    let report = run(Scene::of(10_000, 8, 10_000, 20.0));
    shown("10,000 nodes", std::slice::from_ref(&report));
    check(&report);
}

fn check(report: &Report) {
    assert!(report.done() > 0.999, "{report}");
    assert!(report.quantile(0.99, |job| job.bytes as f64) < CLIENT_BYTES, "{report}");
    assert!(report.quantile(0.99, |job| job.trips.into()) <= TRIPS, "{report}");
    assert!(report.slice <= 128, "{report}");
}
