//! `kinoflock generate --dry-run`: which nodes could, when, and at what work.

use kinoflock_protocol::{Millis, NodeId, Work};
use serde::Serialize;

use super::context::Context;
use super::failure::Failure;
use super::follow;
use crate::ask::Ask;
use crate::output::table::{self, Column};
use crate::route::advice::{self, ReasonRecord};
use crate::route::called;
use crate::session::{Client, Could, Survey};
use crate::ticket::Way;

/// Work units (10^6 FLOP) in a TFLOP.
const UNITS_PER_TFLOP: f64 = 1e6;

#[derive(Serialize)]
struct CouldRow<'a> {
    event: &'static str,
    node: NodeId,
    name: &'a str,
    jobs_ahead: u32,
    told_ms: u64,
    expected_ms: u64,
    compute_ms: u64,
    speed: u64,
    round_trip_ms: Option<u64>,
    reliability: f64,
    jobs_seen: f64,
    is_new: bool,
    is_avoided: bool,
}

#[derive(Serialize)]
struct CannotRow {
    event: &'static str,
    #[serde(flatten)]
    reason: ReasonRecord,
}

#[derive(Serialize)]
struct SurveyRow<'a> {
    event: &'static str,
    model: &'a str,
    frames: u32,
    width: u32,
    height: u32,
    steps: u32,
    work: Work,
    could: usize,
    cannot: usize,
    not_asked: usize,
    prompt_sent: bool,
}

pub(super) async fn run(
    ask: &Ask,
    ways: &[Way],
    context: &Context<'_>,
    client: &Client,
) -> Result<(), Failure> {
    let (events, told) = Client::events();
    let mut progress = context.out.progress();
    let survey = follow::show_while(client.survey(ask, ways, &events), told, &mut progress).await;
    drop(progress);
    client.stop().await;
    show(&survey?, context);
    Ok(())
}

fn show(survey: &Survey, context: &Context<'_>) {
    let Survey { model, shape, work, could, declined, not_asked } = survey;
    let out = context.out;
    for could in could {
        out.record(&CouldRow::of(could));
    }
    for declined in declined {
        out.record(&CannotRow { event: "cannot", reason: ReasonRecord::of(declined) });
    }
    let (frames, width, height, steps) = (shape.frames, shape.width, shape.height, shape.steps);
    let work_text = tflop(work.0);
    out.words(&format!(
        "{frames} frames of {width}x{height} in {steps} steps with {}: {work_text} of work\n",
        model.name
    ));
    let columns = [
        Column::Left("node"),
        Column::Right("ahead"),
        Column::Right("ready in"),
        Column::Right("by its word"),
        Column::Right("its work"),
        Column::Right("speed"),
        Column::Right("round trip"),
        Column::Left("jobs of yours"),
    ];
    let rows: Vec<_> = could.iter().map(cells).collect();
    for (number, line) in table::lines(&columns, &rows).iter().enumerate() {
        if number == 0 { out.heading(line) } else { out.line(line) }
    }
    if !declined.is_empty() {
        let lines: String = advice::grouped(declined).iter().map(|group| format!("\n  {group}")).collect();
        out.words(&format!("\nnot by:{lines}"));
    }
    if *not_asked > 0 {
        out.words(&format!("\n{not_asked} further nodes look slower and were not asked"));
    }
    out.words(
        "\nEvery place was given back. Neither your prompt nor any file was sent. \
         Run it again without --dry-run to have it made.",
    );
    out.record(&SurveyRow {
        event: "survey",
        model: &model.name,
        frames,
        width,
        height,
        steps,
        work: *work,
        could: could.len(),
        cannot: declined.len(),
        not_asked: *not_asked,
        prompt_sent: false,
    });
}

fn cells(could: &Could) -> Vec<String> {
    let Could { node, name, position, told, expected, compute, speed, round_trip, .. } = could;
    vec![
        called(name, node),
        position.to_string(),
        expected.to_string(),
        told.to_string(),
        compute.to_string(),
        format!("{}/s", tflop(*speed)),
        round_trip.map_or_else(|| "-".to_owned(), |time: Millis| time.to_string()),
        seen(could),
    ]
}

fn seen(could: &Could) -> String {
    let mut text = if could.is_new {
        "new to you".to_owned()
    } else {
        let (percent, jobs) = ((could.reliability * 100.0).round(), could.jobs.round().max(1.0));
        format!("{percent} % sure, from {jobs}")
    };
    if could.is_avoided {
        text.push_str(", went wrong a moment ago");
    }
    text
}

/// `950 GFLOP`, `1.2 TFLOP`, `3400 TFLOP`, of work units.
fn tflop(units: u64) -> String {
    let tera = units as f64 / UNITS_PER_TFLOP;
    match tera {
        0.0..0.1 => format!("{:.1} GFLOP", tera * 1e3),
        0.1..100.0 => format!("{tera:.1} TFLOP"),
        _ => format!("{tera:.0} TFLOP"),
    }
}

impl<'a> CouldRow<'a> {
    fn of(could: &'a Could) -> Self {
        Self {
            event: "could",
            node: could.node,
            name: &could.name,
            jobs_ahead: could.position,
            told_ms: could.told.0,
            expected_ms: could.expected.0,
            compute_ms: could.compute.0,
            speed: could.speed,
            round_trip_ms: could.round_trip.map(|time| time.0),
            reliability: could.reliability,
            jobs_seen: could.jobs,
            is_new: could.is_new,
            is_avoided: could.is_avoided,
        }
    }
}
