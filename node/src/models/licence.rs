//! Which licences let anybody pass on copies without terms beyond the licence's own text.
//!
//! Weights go from node to node only under these. A licence with a name of its own may allow it too, under conditions
//! that a program cannot read; who may have such a model fetches it where it is published.

/// SPDX names of open licences.
const OPEN: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC-BY-4.0",
    "CC-BY-SA-4.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unlicense",
    "Zlib",
];

/// Whether an SPDX expression of `AND` and `OR`, without brackets, leaves a way to pass on copies by open licences alone.
#[must_use]
pub fn is_open(expression: &str) -> bool {
    expression.split(" OR ").any(|way| way.split(" AND ").all(|licence| OPEN.contains(&licence.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_way_by_open_licences_alone_is_open() {
        for open in ["MIT", "MIT OR Apache-2.0", "Proprietary OR CC0-1.0", "MIT AND BSD-3-Clause"] {
            assert!(is_open(open), "{open}");
        }
        for closed in ["", "CogVideoX License", "MIT AND Proprietary", "(MIT OR Apache-2.0)", "Apache 2.0"] {
            assert!(!is_open(closed), "{closed}");
        }
    }
}
