//! A step's prediction with guidance in a plan: what [`crate::pipeline::guided`] holds.

use super::PlanOptions;
use super::ledger::{Ghost, cat};
use crate::pipeline::GenerateRequest;

/// The texts of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Texts {
    /// How many.
    pub(crate) count: usize,
    /// How many of them go through the model at once.
    pub(crate) batch: usize,
}

impl Texts {
    pub(crate) fn new(guided: bool, request: &GenerateRequest, options: &PlanOptions) -> Self {
        let together = guided && request.guidance_passes.are_together(options.cpu);
        Self { count: 1 + usize::from(guided), batch: 1 + usize::from(together) }
    }

    /// What there is of one text, for those that go at once.
    pub(crate) fn each(self, one: &Ghost) -> Ghost {
        cat(&vec![one; self.batch], 0)
    }

    /// What there is of all texts, for those that go at once.
    pub(crate) fn at_once(self, all: &Ghost) -> Ghost {
        all.narrow(0, self.batch)
    }

    /// The predictions, `one` in the shape of one of them, and what guidance makes of both.
    pub(crate) fn guided(self, one: &[usize], predict: impl Fn() -> Ghost) {
        let first = predict();
        let _second = (self.count > self.batch).then(&predict);
        if self.count > 1 {
            let one = first.view(one);
            let _guided = one.same().same().same();
        }
    }
}
