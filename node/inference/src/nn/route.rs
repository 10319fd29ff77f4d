//! The way through a transformer's blocks: each once, unless some are left out or computed again.

/// Which blocks are computed how often; every one once by default. Blocks of all sorts are counted through, from 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Route {
    /// Blocks that are left out: what would enter them goes on to the next.
    pub skip: Vec<usize>,
    /// Blocks that are computed once more, right after themselves, for each time that they are named.
    pub repeat: Vec<usize>,
}

impl Route {
    /// How often a block is computed.
    #[must_use]
    pub fn times(&self, block: usize) -> usize {
        if self.skip.contains(&block) {
            return 0;
        }
        1 + self.repeat.iter().filter(|again| **again == block).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_computed_once_unless_something_is_said() {
        let route = Route { skip: vec![1], repeat: vec![2, 0, 2] };
        assert_eq!([0, 1, 2, 3].map(|block| route.times(block)), [2, 0, 3, 1]);
        assert_eq!([0, 9].map(|block| Route::default().times(block)), [1, 1]);
    }
}
