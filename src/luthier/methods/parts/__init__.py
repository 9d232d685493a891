"""What methods are made of. No file here is a method; a method imports from here, and never from another method.

    behind            Behind           the bottleneck that reads its block's stream through the closing norm
                      behind_params, behind_sites, closing_norm, reduced, stream
    adopted           agreed           a setting that the sources of a method decide
                      own_sites, mean_of, no_sources
    of_adapters       OneOfAdapters    one adapter of several: the sources' shape and places
    assignment        assignment       which row goes to which column at the least cost
    bottleneck        Bottleneck       narrow, bend, widen, and add: the inside of every adapter
                      activated, biases_rest, bottleneck_params, check_sublayers, width_of, Activation
                      without_units
    closing           Closing          a bottleneck of what a sublayer gives, added to that
    parallel_branch   Beside           a bottleneck of a sublayer's input, added to its output
    low_rank          ThinUpdate       x -> scale B A x beside a weight: merged, fused, and served in rows
                      MovedUpdate      the same from a start that is no zero: what A and B have moved
                      Thin             the same for an A and B that are made of something else
                      SmallDropout     dropout of a branch's input, the same again under checkpointing
                      check_projections, check_rows, fusable, live_bias
    first_order       kinds_of         a low-rank update to first order around its start
                      check_scope, check_scoped_sites, Scope
    projections       AtProjections    a method of projections: its sites, and that it merges and starts at the base
    low_rank_axes     LowRankAxes      what LoRA and DoRA have in common: scaling, start, who learns and how fast
    posterior         Posterior        a Gaussian over a trained matrix, and what it says of a function's outputs
                      Root             the leading directions of a sum of outer products
                      evidence_precision, matrix_gradients, watched_calls, Call
    starts            thin_start       A and B as a part of the frozen weight
                      check_start, widest, Start, AT_ZERO
    row_starts        start_from_rows  A and B where rows say: what layers read, or the gradient of their weight
                      FromRows, RowStart, FROM_ROWS
    triplets          TripletUpdate    x -> scale P diag(l) Q x beside a weight, whose triplets join and leave
    principal         FrozenFrame      x -> B R A x between the leading directions of the weight
                      check_principal, frame_params, principal
    dense             DenseUpdate      an update as large as the weight, made of few numbers at every pass
    orthogonal        cayley           a rotation from a skew matrix, exactly
                      cayley_series, skew, upper, turn_blocks
    kronecker         KroneckerUpdate  x -> scale (A (x) B) x beside a weight, never formed
                      Rule             n small matrices that all places share
                      kron_linear, near_square, phm_weight, phm_thin, check_divides
    prefixes          Prefixes         keys and values of every attention, or the networks that compute them
                      prefix_params, prefix_stored, drop_networks, groups_of
    layer_plan        plan_edits       what a plan says of each layer: adapters, LoRA, a prefix, biases
                      Planned          a method that says for each layer what stands in it
                      InLayer, Layer, LayerPrefixes, Plan
                      cost_of, layers_named, layers_of, plan_params
    hadamard          Projection       a random projection by fast transforms, made again from its name
                      hadamard
    masks             top_k            exactly k entries of several tensors
                      pack, unpack     a mask, eight entries to a byte
                      no_trace         look at data and leave everything as it was
                      first_share
    in_place          TrainsInPlace    a method that trains tensors of the model where they stand
                      MovesEntries     the same under a mask
                      ScoredEntries    the same, and rows tell which entries move
    update_masks      choose_masks     a share of the model's own numbers that may move
                      add_squares, kept, maskable, sizes_of, Over, Scope
    encoder_ends      encoder_ends     where an encoder's blocks end; a decoder is refused
    cache_room        kept_keys        what an attachment keeps of each token in the model's own cache
                      make_room
                      filled_elsewhere
    prompt            Prompt           vectors before the text, drawn or copied from word embeddings
                      prompt_width
    searched          Components       small components behind gates, of which a search chooses some
                      Gates
                      Place
                      PlaceSearch
                      fitting
                      of_rank
                      open_places
                      place_edits
                      select
    by_halves         half_of          losses of one half of the rows, told apart by their text
                      choice_gradient
                      numbers_below_head, Searched
                      row_losses, searched_loss
    soft_words        SoftWords        words of a template that are vectors of a tuning
                      soft_site
                      words_site
    random_pair       RandomPair       one pair of frozen random matrices for all sites
                      OfPair
    sparse            SparseUpdate     an update of chosen entries of a weight, beside it
                      check_entries
    peft_glora        glora_form       files of peft for five terms in one of several ways
    peft_layers       shared_form      files of peft whose layers share numbers
                      check_order
    peft_prompts      prompt_form      vectors before the text in peft's files
                      before_text, prompt_facts, rows_before, COUNTS, ONE
    peft_rows         rows_form        files of peft for rows of a table
    peft_prefixes     prefix_form      keys and values before the text in peft's files
                      rotation_of, turned
    modifier          Modifier         no edit of its own: it changes the numbers of the methods beside it
                      check_open, check_worth, search_and_train
    scales            RescaleOutput    a number for each that a layer gives, from one on
                      RescaleInput     the same for what it reads
                      Scales
    frozen_below      FrozenBelow      a method that reads a frozen model from outside: no gradient enters
                      no_new_head
    own_tensors       own_modules      what a method finds of itself on a model that may hold other tunings
                      own_tunings, own_unfrozen, own_head, group_names, attached
    narrow_copy       narrow_model     some blocks of a model again, at a fraction of its width
                      prune, kept_layers, side_params, Sizes
    text_mean         mean_over_text   the mean over the real tokens of each row
    watched           Watched          an update that writes its gradient down, beside what made it
    trial_pass        try_pass         two words through the tuned model, when it is attached

A piece that a second method needs moves here. A test holds this list to what the files give.
"""
