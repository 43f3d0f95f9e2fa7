"""Ray and nothing but Ray: connect, worker groups, the evaluation queue. Knows no objective and no recipe."""
