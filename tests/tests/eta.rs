//! Times told at admission, by real daemons whose engines sleep, to several clients whose jobs come and are cancelled at
//! times from a fixed seed.
#![allow(clippy::print_stdout)]

use kinoflock_tests::rig::Rig;
use kinoflock_tests::sim::Scene;
use kinoflock_tests::sim::plan::plan;
use kinoflock_tests::sim::report::Report;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_told_at_admission_hold_for_nine_jobs_in_ten_with_real_processes() {
    // Jobs of one to ten seconds: what a busy machine adds is small beside a quarter of that.
    let scene = Scene { cancels: 0.1, length: 0.5, seed: 2, ..Scene::of(6, 1, 40, 40.0) };
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
