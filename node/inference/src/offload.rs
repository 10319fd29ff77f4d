//! Components that are in memory only while they are needed.
//!
//! A pipeline keeps each of its large components in a [`Slot`]. Each is read when the model is loaded. Where everything
//! fits, it stays. Where it does not, a run goes through its components in turn: each is read when its phase begins
//! and given back when that is over. What is computed is the same, bit for bit; the price is reading the weights anew for
//! every clip.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::adapter::Places;
use crate::error::Error;
use crate::pipeline::{GenerateRequest, LoadOptions};
use crate::plan::{Fit, PlanOptions};
use crate::registry;

/// What becomes of a model's components during a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Offload {
    /// All stay loaded.
    None,
    /// All stay loaded where they fit, else they go in turn.
    #[default]
    Auto,
    /// In turn, always.
    InTurn,
}

/// Whether the slots of a pipeline are emptied behind a run: one for all of them.
#[derive(Debug, Clone, Default)]
pub struct InTurn(Arc<AtomicBool>);

impl InTurn {
    /// From now on.
    pub fn set(&self, on: bool) {
        self.0.store(on, Ordering::Relaxed);
    }

    /// Whether it is so.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where a pipeline's components are, and how that is decided for each run.
pub struct Placement {
    folder: PathBuf,
    options: PlanOptions,
    offload: Offload,
    memory: Option<u64>,
    in_turn: InTurn,
    places: Places,
}

impl Placement {
    /// For a model folder. Where there is a limit, components stay loaded from the beginning only if they fit beside the
    /// model's smallest clip.
    ///
    /// # Errors
    /// As [`Fit::of`].
    pub fn new(folder: &Path, options: &LoadOptions) -> Result<Self, Error> {
        let this = Self {
            folder: folder.to_owned(),
            options: PlanOptions::of(options),
            offload: options.offload,
            memory: options.memory,
            in_turn: InTurn::default(),
            places: options.places.clone(),
        };
        let in_turn = match (this.offload, this.memory) {
            (Offload::InTurn, _) => true,
            (Offload::Auto, Some(memory)) => {
                let smallest = registry::facts(folder)?.smallest();
                Fit::of(folder, &smallest, &this.options, (this.offload, Some(memory)))?.needs.in_turn
            }
            _ => false,
        };
        this.in_turn.set(in_turn);
        Ok(this)
    }

    /// What the slots of the pipeline follow.
    #[must_use]
    pub fn turns(&self) -> &InTurn {
        &self.in_turn
    }

    /// Decides for a run, before anything of it is loaded, and gives the request as it then goes: with the pieces in which it
    /// is decoded, and how guidance's predictions are computed.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] with what is needed and what there is.
    pub fn settle(&self, request: &GenerateRequest) -> Result<GenerateRequest, Error> {
        let mut settled = request.clone();
        let Some(available) = self.memory else { return Ok(settled) };
        let adapters = self.places.beside(&request.adapters).to_vec();
        let beside = GenerateRequest { adapters, ..request.clone() };
        let fit = Fit::of(&self.folder, &beside, &self.options, (self.offload, self.memory))?;
        if !fit.needs.fits {
            return Err(Error::DoesNotFit { needed: fit.needs.bytes, available });
        }
        self.in_turn.set(fit.needs.in_turn);
        (settled.decode, settled.guidance_passes) = (fit.decode, fit.passes);
        Ok(settled)
    }
}

type Read<T> = Box<dyn Fn() -> Result<(T, u64), Error> + Send + Sync>;

/// A component, or the way to read it.
pub struct Slot<T> {
    held: Mutex<Option<Arc<T>>>,
    read: Read<T>,
    in_turn: InTurn,
}

impl<T> Slot<T> {
    /// A slot whose component is read at once, with how many parameters it has, and given back where components go in turn:
    /// what cannot be read is told when a model is loaded, not by the first run.
    ///
    /// # Errors
    /// What reading reports.
    pub fn new(
        in_turn: &InTurn,
        read: impl Fn() -> Result<(T, u64), Error> + Send + Sync + 'static,
    ) -> Result<(Self, u64), Error> {
        let (component, parameters) = read()?;
        let held = (!in_turn.is_on()).then(|| Arc::new(component));
        Ok((Self { held: Mutex::new(held), read: Box::new(read), in_turn: in_turn.clone() }, parameters))
    }

    /// The component, read if it is not there.
    ///
    /// # Errors
    /// What reading reports.
    pub fn get(&self) -> Result<Arc<T>, Error> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match &*held {
            Some(component) => Ok(Arc::clone(component)),
            None => {
                let component = Arc::new((self.read)()?.0);
                *held = Some(Arc::clone(&component));
                Ok(component)
            }
        }
    }

    /// Gives the component back where components go in turn.
    pub fn give_back(&self) {
        if self.in_turn.is_on() {
            *self.held.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// Whether the component is in memory.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_component_is_read_again_only_after_it_was_given_back() {
        let reads = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&reads);
        let in_turn = InTurn::default();
        let read = move || Ok((counted.fetch_add(1, Ordering::Relaxed), 5));
        let (slot, parameters) = Slot::new(&in_turn, read).unwrap();
        assert_eq!(parameters, 5);
        slot.give_back();
        assert!(slot.is_held(), "without turns it stays");
        assert_eq!((*slot.get().unwrap(), reads.load(Ordering::Relaxed)), (0, 1));
        in_turn.set(true);
        slot.give_back();
        assert!(!slot.is_held());
        assert_eq!((*slot.get().unwrap(), reads.load(Ordering::Relaxed)), (1, 2));
    }
}
