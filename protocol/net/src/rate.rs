//! A token bucket: a ceiling on bytes per second that any number of streams share.

use std::num::NonZeroU64;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// The bucket holds what flows in this time, so that short transfers are not slowed.
const BURST: Duration = Duration::from_millis(250);

/// A ceiling on bytes per second; without a rate it never waits.
#[derive(Debug)]
pub struct RateLimit {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rate: Option<NonZeroU64>,
    /// When everything granted so far will have flowed at the rate.
    paid_until: Instant,
}

impl RateLimit {
    /// A ceiling of `rate` bytes per second, or none.
    #[must_use]
    pub fn new(rate: Option<NonZeroU64>) -> Self {
        Self { state: Mutex::new(State { rate, paid_until: Instant::now() }) }
    }

    /// Changes the ceiling; streams that wait already finish their wait.
    pub fn set(&self, rate: Option<NonZeroU64>) {
        let mut state = self.state.lock().expect("invariant: no panic while the lock is held");
        state.rate = rate;
        state.paid_until = Instant::now();
    }

    /// Waits until `bytes` more may flow.
    pub async fn take(&self, bytes: usize) {
        if let Some(until) = self.grant(bytes, Instant::now()) {
            tokio::time::sleep_until(until).await;
        }
    }

    /// Books `bytes`, and says until when their sender has to wait.
    fn grant(&self, bytes: usize, now: Instant) -> Option<Instant> {
        let mut state = self.state.lock().expect("invariant: no panic while the lock is held");
        let rate = state.rate?;
        let cost = Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
        state.paid_until = state.paid_until.max(now.checked_sub(BURST).unwrap_or(now)) + cost;
        (state.paid_until > now).then_some(state.paid_until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_spreads_bytes_over_time_and_no_rate_never_waits() {
        let limit = RateLimit::new(NonZeroU64::new(1000));
        let now = Instant::now();
        assert_eq!(limit.grant(250, now + BURST), None, "the burst passes at once");
        let until = limit.grant(1000, now + BURST).expect("a second's worth waits");
        assert_eq!(until, now + BURST + Duration::from_secs(1));
        let second = limit.grant(500, now + BURST).expect("later bytes wait behind earlier ones");
        assert_eq!(second, until + Duration::from_millis(500));
        limit.set(None);
        assert_eq!(limit.grant(usize::MAX, now), None);
    }
}
