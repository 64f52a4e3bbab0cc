//! A seeded generator of our own, so that a seed means the same on every machine and with every release of every library.
//!
//! Promises. Equal seeds give equal numbers, for ever: a changed constant would make every seed in docs/record.md a lie.
//! Not promised. Anything of use to cryptography.

/// PCG (XSH-RR 64/32): 64 bits of state, 32 bits a draw.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
const INCREMENT: u64 = 1_442_695_040_888_963_407;

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut random = Self { state: seed.wrapping_add(INCREMENT) };
        // Seeds are small and close together; a few rounds carry their difference into every bit.
        for _ in 0..4 {
            random.u32();
        }
        random
    }

    /// A generator whose draws do not disturb this one's.
    pub fn fork(&mut self) -> Self {
        Self::new(self.u64())
    }

    pub fn u32(&mut self) -> u32 {
        let old = self.state;
        self.state = old.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
        let mixed = (((old >> 18) ^ old) >> 27) as u32;
        mixed.rotate_right((old >> 59) as u32)
    }

    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) << 32 | u64::from(self.u32())
    }

    /// Below `n`, which is at least one.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "nothing is below zero");
        // The bias of the remainder is far below what a simulation can notice.
        self.u64() % n
    }

    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// Both ends included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True `n` times in `of`.
    pub fn chance(&mut self, n: u64, of: u64) -> bool {
        self.below(of) < n
    }

    pub fn coin(&mut self) -> bool {
        self.u32() & 1 == 1
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.index(of.len())]
    }

    /// An index, drawn by weight; the sum is above zero.
    pub fn weighted(&mut self, weights: &[u64]) -> usize {
        let mut left = self.below(weights.iter().sum());
        for (i, &weight) in weights.iter().enumerate() {
            if left < weight {
                return i;
            }
            left -= weight;
        }
        unreachable!("the draw is below the sum of the weights")
    }

    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.u32() as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_for_ever() {
        let mut random = Random::new(1);
        assert_eq!([random.u32(), random.u32(), random.u32()], GOLDEN);
        let (mut a, mut b) = (Random::new(7), Random::new(7));
        assert!((0..100).all(|_| a.u64() == b.u64()));
        assert_ne!(Random::new(1).u64(), Random::new(2).u64());
    }

    const GOLDEN: [u32; 3] = [1_968_572_995, 1_080_415_314, 2_578_637_408];
}
