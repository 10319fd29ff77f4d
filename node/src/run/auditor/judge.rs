//! From what a worker found to what an auditor signs. Pure.

use kinoflock_inference::audit::{FRAMES_TOLERANCE, Precision, tolerance};
use kinoflock_protocol::audit::{
    AuditDifference, AuditObstacle, AuditOutcome, AuditPrecision, Leaf, Opening,
};
use kinoflock_protocol::capacity::DeviceClass;
use kinoflock_protocol::codec::Text;
use kinoflock_protocol::id::BlobId;
use kinoflock_protocol::receipt::Receipt;
use kinoflock_protocol::units::Micro;

use crate::engine::wire::{AuditReport, Failure};

/// Codes of failures that say that what was shown is no latents of this job.
const NO_LATENTS: [&str; 2] = ["initial_latents", "latent_shape"];

/// What is signed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Found {
    pub(super) outcome: AuditOutcome,
    pub(super) deviation: Micro,
    pub(super) tolerance: Micro,
    pub(super) precision: AuditPrecision,
}

/// What a maker showed, checked against what it committed to and what was computed here.
pub(super) fn judge(
    report: &AuditReport,
    openings: &[Opening],
    root: &BlobId,
    step: u32,
    precision: AuditPrecision,
) -> Found {
    let limit = tolerance(match precision {
        AuditPrecision::Full => Precision::Full,
        AuditPrecision::Half => Precision::Half,
    });
    let found = |outcome, deviation: f64, limit: f64| Found {
        outcome,
        deviation: Micro::from_f64(deviation).unwrap_or(Micro(i64::MAX)),
        tolerance: Micro::from_f64(limit).unwrap_or(Micro(i64::MAX)),
        precision,
    };
    let differs = AuditOutcome::Differs;
    if !shown_as_committed(report, openings, root, step) {
        return found(differs(AuditDifference::Opening), 0.0, limit);
    }
    match () {
        () if !report.starts_well => found(differs(AuditDifference::Start), report.deviation, limit),
        () if !is_within(report.deviation, limit) => {
            found(differs(AuditDifference::Step), report.deviation, limit)
        }
        () if !is_within(report.frames, FRAMES_TOLERANCE) => {
            found(differs(AuditDifference::Frames), report.frames, FRAMES_TOLERANCE)
        }
        () => found(AuditOutcome::Honest, report.deviation, limit),
    }
}

/// What is no number is within nothing.
fn is_within(deviation: f64, limit: f64) -> bool {
    deviation.is_finite() && deviation <= limit
}

/// Whether each state is the one whose leaf is under the root.
fn shown_as_committed(report: &AuditReport, openings: &[Opening], root: &BlobId, step: u32) -> bool {
    let Some(last) = openings.last() else { return false };
    let (leaves, places) = (u64::from(last.index) + 1, [0, step, step + 1, last.index]);
    let holds = |(at, place): (usize, &u32)| {
        let opening = openings.iter().find(|opening| opening.index == *place);
        opening.is_some_and(|opening| {
            let leaf = Leaf::new(&opening.latents, &report.samplers[at].0, &report.conditioning.0);
            opening.latents == report.latents[at]
                && opening.proof.holds(root, leaves, u64::from(*place), &leaf)
        })
    };
    places.iter().enumerate().all(holds)
}

/// What a worker's failure says.
pub(super) fn failed(failure: &Failure) -> Found {
    if NO_LATENTS.contains(&failure.code.as_str()) {
        return AuditOutcome::Differs(AuditDifference::Opening).into();
    }
    // The failure's own words may quote the prompt.
    let why = Text::truncated(&format!("the auditor's own worker failed: {}", failure.code));
    AuditOutcome::CouldNotLook { obstacle: AuditObstacle::Auditor, why }.into()
}

/// In which numbers both computed. f32 is as exact as was measured on CPUs only; who does not say what it computed in
/// gets the benefit of the doubt.
pub(super) fn precision(maker: &Receipt, here: Option<DeviceClass>, dtype: &str) -> AuditPrecision {
    let full = maker.device == DeviceClass::Cpu
        && maker.engine.as_str().ends_with(" f32")
        && here == Some(DeviceClass::Cpu)
        && dtype == "f32";
    if full { AuditPrecision::Full } else { AuditPrecision::Half }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kinoflock_protocol::audit::{prove, root};
    use kinoflock_protocol::clip::BlobRef;

    use super::*;
    use crate::engine::wire::{Hash, Name};
    use kinoflock_protocol::JobId;

    const STEPS: usize = 8;
    const STEP: u32 = 3;

    fn shown() -> (AuditReport, Vec<Opening>, BlobId) {
        let state = |index: usize| BlobId::of(&[index as u8]);
        let leaves: Vec<_> =
            (0..=STEPS).map(|index| Leaf::new(&state(index), &[index as u8; 32], &[9; 32])).collect();
        let places = [0, STEP as usize, STEP as usize + 1, STEPS];
        let openings = places.map(|index| Opening {
            index: index as u32,
            latents: state(index),
            sealed: BlobRef::of(b"sealed"),
            proof: prove(&leaves, index).unwrap(),
        });
        let report = AuditReport {
            job: JobId::from_bytes([1; 32]),
            latents: places.map(state),
            samplers: places.map(|index| Hash([index as u8; 32])),
            conditioning: Hash([9; 32]),
            starts_well: true,
            deviation: 1e-6,
            frames: 1.0,
            dtype: Name::truncated("f32"),
        };
        (report, openings.to_vec(), root(&leaves).unwrap())
    }

    fn outcome(change: impl FnOnce(&mut AuditReport, &mut Vec<Opening>)) -> AuditOutcome {
        let (mut report, mut openings, root) = shown();
        change(&mut report, &mut openings);
        judge(&report, &openings, &root, STEP, AuditPrecision::Full).outcome
    }

    #[test]
    fn each_part_that_is_wrong_is_told_by_its_name() {
        use AuditDifference::{Frames, Opening, Start, Step};
        assert_eq!(outcome(|_, _| {}), AuditOutcome::Honest);
        let differs = AuditOutcome::Differs;
        assert_eq!(outcome(|report, _| report.latents[1] = BlobId::of(b"other")), differs(Opening));
        assert_eq!(outcome(|report, _| report.conditioning = Hash([8; 32])), differs(Opening));
        assert_eq!(outcome(|report, _| report.samplers[3] = Hash([0; 32])), differs(Opening));
        assert_eq!(outcome(|_, openings| openings.truncate(3)), differs(Opening));
        assert_eq!(outcome(|report, _| report.starts_well = false), differs(Start));
        assert_eq!(outcome(|report, _| report.deviation = 1e-2), differs(Step));
        assert_eq!(outcome(|report, _| report.deviation = f64::NAN), differs(Step));
        assert_eq!(outcome(|report, _| report.frames = f64::INFINITY), differs(Frames));
    }

    #[test]
    fn only_latents_that_are_none_speak_against_the_maker_and_not_a_worker_that_failed() {
        let of = |code: &str| failed(&Failure::new(code, "a prompt", true)).outcome;
        assert_eq!(of("latent_shape"), AuditOutcome::Differs(AuditDifference::Opening));
        let AuditOutcome::CouldNotLook { obstacle, why } = of("out_of_memory") else { panic!("no verdict") };
        assert_eq!(obstacle, AuditObstacle::Auditor);
        assert!(!why.contains("a prompt"));
    }
}
