//! What an encoder made of the last few texts, so that a prompt is encoded once however many clips are made of it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::Error;

/// Texts that are remembered. Of T5 XXL's embeddings of 512 tokens in f32 these are 64 MiB.
const MOST_TEXTS: usize = 8;

/// Results by text, the one used last at the end.
#[derive(Debug)]
pub struct TextCache<K, V> {
    entries: Mutex<VecDeque<(K, V)>>,
    made: AtomicUsize,
}

impl<K, V> Default for TextCache<K, V> {
    fn default() -> Self {
        Self { entries: Mutex::default(), made: AtomicUsize::new(0) }
    }
}

impl<K: PartialEq, V: Clone> TextCache<K, V> {
    /// What is remembered of `key`, or what `make` makes of it, which is then remembered in the place of what was not used
    /// for longest.
    ///
    /// # Errors
    /// What `make` gives; nothing is remembered then.
    pub fn get_or(&self, key: K, make: impl FnOnce() -> Result<V, Error>) -> Result<V, Error> {
        let entries = || self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let put = |entry: (K, V)| {
            let mut entries = entries();
            while entries.len() >= MOST_TEXTS {
                entries.pop_front();
            }
            entries.push_back(entry);
        };
        let found = {
            let mut entries = entries();
            let at = entries.iter().position(|(known, _)| *known == key);
            at.and_then(|at| entries.remove(at))
        };
        let value = match found {
            Some((_, value)) => value,
            None => {
                let value = make()?;
                self.made.fetch_add(1, Ordering::Relaxed);
                value
            }
        };
        put((key, value.clone()));
        Ok(value)
    }

    /// How often something had to be made.
    #[must_use]
    pub fn made(&self) -> usize {
        self.made.load(Ordering::Relaxed)
    }

    /// Forgets everything, for when the encoder is another one from now on.
    pub fn forget(&self) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_last_few_texts_are_made_once_and_older_ones_are_forgotten() {
        let cache = TextCache::default();
        let ask = |key: usize| cache.get_or(key, || Ok(key * 2)).unwrap();
        for key in 0..MOST_TEXTS {
            assert_eq!(ask(key), key * 2);
        }
        // Used again, so that the next one to go is 1.
        assert_eq!((ask(0), cache.made()), (0, MOST_TEXTS));
        ask(100);
        assert_eq!((ask(0), cache.made()), (0, MOST_TEXTS + 1));
        assert_eq!((ask(1), cache.made()), (2, MOST_TEXTS + 2));
        cache.forget();
        assert_eq!((ask(1), cache.made()), (2, MOST_TEXTS + 3));
    }

    #[test]
    fn what_fails_is_not_remembered() {
        let cache = TextCache::<u8, u8>::default();
        let failing = cache.get_or(1, || Err(Error::Cancelled { steps_done: 0, steps: 1 }));
        assert!(failing.is_err() && cache.made() == 0);
        assert_eq!(cache.get_or(1, || Ok(5)).unwrap(), 5);
    }
}
