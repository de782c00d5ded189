// Where the arrays of several sequences end to end have the row `head`, a KV head of one of them:
// the first of its block ids and of its exact rows, how many exact rows, and which pool.
struct lkv_place {
  int ids, first, exact, pool;
};

// places [sequences, 5], of each: where its block ids begin and how many a head has, where its
// exact rows begin and how many a head has, and its pool. `heads` are those of a sequence.
template <class P>
DEVFN lkv_place lkv_place_of(P places, int head, int heads) {
  P mine = places + head / heads * 5;
  lkv_place place;
  place.ids = mine[0] + head % heads * mine[1];
  place.first = mine[2] + head % heads * mine[3];
  place.exact = mine[3];
  place.pool = mine[4];
  return place;
}
