//! Union-find over indices, which joins sets in nearly linear time.

/// Disjoint sets of the indices `0..len`.
#[derive(Default)]
pub(super) struct DisjointSets {
    parent: Vec<usize>,
}

impl DisjointSets {
    /// Returns `len` sets of one index each.
    pub fn new(len: usize) -> DisjointSets {
        DisjointSets {
            parent: (0..len).collect(),
        }
    }

    /// Adds a set of one index and returns the index.
    pub fn add(&mut self) -> usize {
        let index = self.parent.len();
        self.parent.push(index);
        index
    }

    /// Joins the sets of two indices. The lower root becomes the root of both.
    pub fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.shorten(a), self.shorten(b));
        self.parent[a.max(b)] = a.min(b);
    }

    /// Points every index at its root, so that [`Self::root`] takes one step.
    pub fn flatten(&mut self) {
        for index in 0..self.parent.len() {
            // A parent has never a higher index than its child, so it points at its root already.
            self.parent[index] = self.parent[self.parent[index]];
        }
    }

    /// Returns the number of the set of an index.
    pub fn root(&self, mut index: usize) -> usize {
        while self.parent[index] != index {
            index = self.parent[index];
        }
        index
    }

    /// Returns the root and halves the path to it, because long chains would otherwise cost
    /// quadratic time.
    fn shorten(&mut self, mut index: usize) -> usize {
        while self.parent[index] != index {
            self.parent[index] = self.parent[self.parent[index]];
            index = self.parent[index];
        }
        index
    }
}

#[cfg(test)]
mod tests {
    use super::DisjointSets;

    #[test]
    fn chain_joined_from_end_has_one_root() {
        let mut sets = DisjointSets::new(50_000);
        for index in (1..50_000).rev() {
            sets.join(index, index - 1);
        }
        sets.flatten();

        assert!((0..50_000).all(|index| sets.root(index) == 0));
        assert!(sets.parent.iter().all(|parent| *parent == 0), "it is flat");
    }

    #[test]
    fn unjoined_sets_stay_separate() {
        let mut sets = DisjointSets::new(2);
        let third = sets.add();
        sets.join(third, 0);
        sets.flatten();

        assert_eq!(sets.root(third), sets.root(0));
        assert_ne!(sets.root(1), sets.root(0));
    }
}
