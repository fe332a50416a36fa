// Texts to begin with: a context of several paragraphs, and a question.

export const QUESTION = "Why do rabbits dig burrows?";

export const CONTEXT = [
  "The common kestrel is a small falcon that hunts over open country. It is known for its hovering flight: it holds its head still in the wind while it searches the grass below for voles, and it sees ultraviolet light, which the traces of voles reflect. A kestrel weighs about two hundred grams, and the female is larger than the male, as with most birds of prey.",
  "Kestrels do not build nests. They lay their eggs in hollow trees, on ledges of cliffs and buildings, or in the old nests of crows. In towns they use church towers and bridges, and they take to boxes that people put up for them. The same place may be used for many years, by one pair after another.",
  "The female lays three to six eggs in April or May, reddish brown and spotted. She broods them for about four weeks, while the male brings food to her. He calls from a nearby tree, and she flies to meet him and takes the prey from his claws.",
  "The chicks are covered in white down when they hatch. For the first ten days the female stays with them and tears the prey into small pieces; afterwards both parents hunt. In years with many voles all the chicks may survive, and in poor years only the eldest do.",
  "After a month the young leave the nest. They stay near their parents for some weeks and learn to hunt large insects at first, then mice. In autumn they scatter, and many from the north of Europe move to the south and west, some as far as Africa.",
].join("\n\n");
